"""Train with the settings of a page's program, in a few small steps: see `main`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nemo_kd.bridge import cpu
from nemo_kd.loss import KDConfig

SEQ_LENGTH, BATCH, STEPS = 32, 4, 2


def main(block: str) -> None:
    """`block`: file with the program, whose `settings()` names files of the current directory."""
    from nemo_kd.bridge import finetune

    program: dict[str, object] = {"__name__": "page"}
    exec(compile(Path(block).read_text(), block, "exec"), program)
    settings = program["settings"]
    assert callable(settings)
    config = settings()
    config.dataset.seq_length = config.model.seq_length = SEQ_LENGTH
    config.train.global_batch_size, config.train.train_iters = BATCH, STEPS
    config.scheduler.lr_warmup_iters = 0
    # Megatron's bf16 optimizer takes tensors of CUDA only.
    config.mixed_precision, config.model.bf16 = None, False
    config.model.params_dtype = config.model.pipeline_dtype = torch.float32
    finetune(config, KDConfig(alpha=0.9))


if __name__ == "__main__":
    cpu.install()
    main(*sys.argv[1:])
