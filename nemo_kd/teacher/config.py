"""`model.kd` of a dump, and the keys of its other blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from nemo_kd.keys import check_keys, settings_of
from nemo_kd.teacher.rows import TEMPLATE_KEYS


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


DATA_KEYS = (
    "file_path",
    *TEMPLATE_KEYS,
    "min_seq_length",
    "no_answer",
    "memmap_workers",
    "index_mapping_dir",
    # NeMo's, for the reading of files.
    "hf_dataset",
    "global_sample_mapping",
)
NO_ANSWER = ("refuse", "drop")
GENERATION_KEYS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "samples_per_prompt",
    "stop_ids",
    "seed",
    "keep_unfinished",
    "filter",
)


def dump_config(cfg: DictConfig) -> KDDumpConfig:
    """`model.kd` of a dump or a generation, with the keys of their other blocks checked."""
    check_keys(cfg.teacher, ("kind",), "teacher")
    check_keys(cfg.data, DATA_KEYS, "data")
    if cfg.data.no_answer not in NO_ANSWER:
        raise ValueError(f"data.no_answer={cfg.data.no_answer}: expected {' or '.join(NO_ANSWER)}")
    if "generation" in cfg:
        check_keys(cfg.generation, GENERATION_KEYS, "generation")
        check_keys(cfg.generation.filter, ("pattern", "function"), "generation.filter")
    return settings_of(KDDumpConfig, cfg.model.kd, "model.kd")
