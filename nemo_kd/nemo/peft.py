"""NeMo's parameter-efficient fine-tuning under distillation: new and restored adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.installed import has_adapters, nemo_version

if TYPE_CHECKING:
    from nemo_kd.nemo.model import MegatronGPTSFTKDModel

SCHEMES = ("lora", "ia3", "adapter")


def schemes_of(cfg: DictConfig) -> list[str]:
    """Return the schemes of `model.peft`, without importing NeMo; none without adapters.

    Errors: NemoKDError for other schemes: p-tuning needs its own tokens in the samples, and
    NeMo refuses selective tuning for Megatron-core models; for any scheme where NeMo's model
    cannot hold adapters.
    """
    schemes = [name for name in str(cfg.model.peft.peft_scheme or "none").split(",") if name]
    if schemes == ["none"]:
        return []
    for scheme in schemes:
        if scheme not in SCHEMES:
            raise NemoKDError(
                f"model.peft.peft_scheme={scheme} is not supported under distillation; choose "
                f"none or one of {', '.join(SCHEMES)}"
            )
    if schemes and not has_adapters():
        raise NemoKDError(
            f"model.peft.peft_scheme={','.join(schemes)} does not work with NeMo {nemo_version()}, "
            "whose SFT model takes no adapters; set none, or train with NeMo 2.4 (container 25.07)"
        )
    return schemes


def add_adapters(cfg: DictConfig, model: MegatronGPTSFTKDModel) -> None:
    """Add the adapters of `model.peft`: new ones, or those of `model.peft.restore_from_path`.

    Errors: NemoKDError for adapters of another model or layout.
    """
    schemes = schemes_of(cfg)
    if not schemes:
        return
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP

    from nemo_kd.nemo.compat import fit_adapters_to_megatron

    fit_adapters_to_megatron()
    configs = [PEFT_CONFIG_MAP[scheme](model.cfg) for scheme in schemes]
    path = cfg.model.peft.restore_from_path
    if not path:
        model.add_adapter(configs)
        return
    try:
        model.load_adapters(path, configs)
    except (AssertionError, RuntimeError) as error:  # other names, or other shapes
        reason = str(error).strip().splitlines()[-1:] or ["their weights have other names"]
        raise NemoKDError(
            f"model.peft.restore_from_path={path}: the adapters do not fit "
            f"{cfg.model.restore_from_path} on these tensor and pipeline parallel sizes "
            f"({reason[0].strip()}); use the model and the sizes of their training"
        ) from error
