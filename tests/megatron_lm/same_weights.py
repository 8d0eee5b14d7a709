"""`pretrain_gpt_kd.py` from the weights of `tests/layouts/same_weights.py`, with all digits.

    torchrun … tests/megatron_lm/same_weights.py OPTIONS

Megatron-LM's own second line of a run has the mean of the first two steps, in seven digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.layouts.same_weights import draw, loaded

EXAMPLE = Path(__file__).parent.parent.parent / "examples/megatron_lm/pretrain_gpt_kd.py"


def main() -> None:
    example = loaded(EXAMPLE)
    example.cpu.install_megatron_lm()
    from megatron.training import get_args, training

    from nemo_kd.store import Store

    build, step, evaluate = (
        training.setup_model_and_optimizer,
        training.train_step,
        training.evaluate,
    )

    def setup_model_and_optimizer(*arguments: Any, **keywords: Any) -> Any:
        model, *others = build(*arguments, **keywords)
        args = get_args()
        for part in model if args.iteration == 0 else []:  # else from a checkpoint
            draw(part.module, Store(args.kd_store[0]).spec.vocab_size)
        return model, *others

    def train_step(*arguments: Any, **keywords: Any) -> Any:
        return show("train", step(*arguments, **keywords))

    training.setup_model_and_optimizer = setup_model_and_optimizer
    training.train_step = train_step
    training.evaluate = lambda *args, **keywords: show("valid", evaluate(*args, **keywords))
    example.main()


def show(kind: str, result: Any) -> Any:
    """Print the means, which come first in the results of Megatron-LM's functions."""
    from megatron.core import parallel_state

    tensor, data = "get_tensor_model_parallel_rank", "get_data_parallel_rank"
    if result[0] and not any(getattr(parallel_state, rank)() for rank in (tensor, data)):
        print(kind, json.dumps({name: float(mean) for name, mean in result[0].items()}))
    return result


if __name__ == "__main__":
    main()
