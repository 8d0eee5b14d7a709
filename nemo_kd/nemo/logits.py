"""Logits of a `.nemo` on one sequence.

    python -m nemo_kd.nemo.logits MODEL TOKENIZER IDS OUT [DTYPE]

MODEL is a .nemo or its unpacked directory, TOKENIZER the tokenizer's directory, IDS a file of
torch.save with token ids `[1, S]`; OUT gets float32 logits `[S, V padded]`, of weights rounded to
DTYPE.
"""

from __future__ import annotations

import sys

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_kd.nemo import cpu, start


def main(path: str, tokenizer: str, ids: str, result: str, dtype: str = "float32") -> None:
    start.install()
    rounded = getattr(torch, dtype)
    torch.save(logits(path, tokenizer, torch.load(ids, weights_only=True), rounded), result)


@torch.no_grad()
def logits(path: str, tokenizer: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from nemo_kd.nemo.vocabulary import SFTModel

    cfg = _settings(tokenizer)
    trainer = start.build_trainer(cfg)
    start.start_process_groups(cfg.model, trainer)
    model = start.restore(path, SFTModel, cfg, trainer).model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    positions = torch.arange(ids.size(1))[None]
    output: torch.Tensor = model(ids, positions, attention_mask=None, labels=None)  # [1, S, V]
    return output[0].float()


def _settings(tokenizer: str) -> DictConfig:
    """What NeMo needs for a forward pass of one process on a CPU, in float32."""
    model = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "seed": 1234,
        "megatron_amp_O2": False,  # which NeMo has in half precision only
        "tokenizer": {"library": "huggingface", "type": tokenizer, "use_fast": True},
    }
    cfg = OmegaConf.create({"model": model, "trainer": {}})
    for key, value in cpu.cpu_settings().items():
        OmegaConf.update(cfg, key, value, force_add=True)
    del cfg.model.data
    quiet = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    cfg.trainer.update(devices=1, num_nodes=1, **dict.fromkeys(quiet, False))
    cfg.exp_manager = None
    return cfg


if __name__ == "__main__":
    main(*sys.argv[1:])
