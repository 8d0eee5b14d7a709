"""`model.kd` of a dump."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from nemo_kd.settings.dataclass import settings_of


@dataclass(frozen=True)
class KDDumpConfig:
    """What is kept of the teacher; `StoreSpec` says which values a store can hold."""

    top_k: int = 100
    """Logits kept for each answer token, with their ids; the number of draws for `sampled`."""
    temperatures: tuple[float, ...] = (1.0,)
    """A log-sum-exp is stored for each; 1 must be among them. The training's
    `model.kd.temperature` is one of them."""
    profile: str = "plain"
    """How the store keeps them: `plain` (at most 404 bytes an answer token at K = 100), `compact`
    (at most 250), `top_p` (as many as hold a given mass), `sampled` (draws, at most 40)."""
    profile_options: dict[str, Any] = field(default_factory=dict)
    """The profile's own: `{p: 0.95}` of `top_p`, `{seed: 0}` of `sampled`."""


def dump_config(cfg: DictConfig) -> KDDumpConfig:
    """`model.kd` of a dump or a generation."""
    return settings_of(KDDumpConfig, cfg.model.kd, "model.kd")
