"""`tests/layouts/same_weights.py` without weight decay, of which Megatron-LM exempts the norms."""

from __future__ import annotations

from functools import partial

from nemo_kd.mcore import cpu


def main() -> None:
    cpu.install()
    import megatron.core.optimizer as optimizer

    from tests.layouts import same_weights

    optimizer.OptimizerConfig = partial(optimizer.OptimizerConfig, weight_decay=0.0)
    same_weights.main()


if __name__ == "__main__":
    main()
