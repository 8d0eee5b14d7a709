"""NeMo's parameter-efficient fine-tuning under distillation: new and restored adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from nemo_kd.errors import NemoKDError

if TYPE_CHECKING:
    from nemo_kd.nemo.model import MegatronGPTSFTKDModel

SCHEMES = ("lora", "ia3", "adapter")


def add_adapters(cfg: DictConfig, model: MegatronGPTSFTKDModel) -> None:
    """Add the adapters of `model.peft`: new ones, or those of `model.peft.restore_from_path`.

    Errors: NemoKDError for other schemes: p-tuning needs its own tokens in the samples, and
    NeMo refuses selective tuning for Megatron-core models.
    """
    schemes = [name for name in str(cfg.model.peft.peft_scheme or "none").split(",") if name]
    if schemes == ["none"]:
        return
    for scheme in schemes:
        if scheme not in SCHEMES:
            raise NemoKDError(
                f"model.peft.peft_scheme={scheme} is not supported under distillation; choose "
                f"none or one of {', '.join(SCHEMES)}"
            )
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP

    from nemo_kd.nemo.compat import fit_adapters_to_megatron

    fit_adapters_to_megatron()
    configs = [PEFT_CONFIG_MAP[scheme](model.cfg) for scheme in schemes]
    if cfg.model.peft.restore_from_path:
        model.load_adapters(cfg.model.peft.restore_from_path, configs)
    else:
        model.add_adapter(configs)
