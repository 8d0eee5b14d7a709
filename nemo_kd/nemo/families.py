"""NeMo's SFT model with settings of families of models that NeMo's own cannot say."""

from __future__ import annotations

from typing import Any

import torch
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
    MegatronGPTSFTModel,
)
from omegaconf import DictConfig, open_dict

from nemo_kd.errors import NemoKDError

UNUSED_BASE = 10000.0


class FamilyModel(MegatronGPTSFTModel):
    """SFT model that reads `model.rope_frequencies`, the angle per position of each pair of a head.

    A checkpoint with that list has no `rotary_base`, so that a NeMo without this class fails on it
    instead of rotating by other angles.
    """

    def build_transformer_config(self) -> Any:
        config = super().build_transformer_config()
        if config.window_size is not None:
            # Megatron's own attention has no windows; `check_length` refuses rows beyond them.
            te = self.cfg.get("transformer_engine", False)
            config.window_size = tuple(config.window_size) if te else None
        return config

    def model_provider_func(self, pre_process: bool, post_process: bool) -> Any:
        frequencies = self.cfg.get("rope_frequencies")
        if frequencies is None:
            return super().model_provider_func(pre_process, post_process)
        with open_dict(self.cfg):
            self.cfg.rotary_base = UNUSED_BASE
        model = super().model_provider_func(pre_process, post_process)
        self.cfg.rotary_base = None
        rope = model.rotary_pos_emb
        given = torch.tensor(list(frequencies), dtype=rope.inv_freq.dtype)
        rope.inv_freq = given.to(rope.inv_freq.device)
        return model


def check_length(model_cfg: DictConfig, length: int, where: str) -> None:
    """Raise NemoKDError if the model is another one for rows of `length` tokens."""
    limits = []
    if model_cfg.get("max_tokens") is not None:
        limits.append((model_cfg.max_tokens, "its positions or its attention change"))
    if model_cfg.get("window_size") is not None and not model_cfg.get("transformer_engine"):
        window = model_cfg.window_size[0] + 1
        limits.append((window, "its sliding window needs TransformerEngine's attention"))
    if not limits:
        return
    limit, reason = min(limits)
    if length > limit:
        raise NemoKDError(
            f"{where}.max_seq_length={length}: beyond {limit} tokens {reason}, which Megatron-core "
            f"does not do here; set {where}.max_seq_length={limit} or less"
        )
