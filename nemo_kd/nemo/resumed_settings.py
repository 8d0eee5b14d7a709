"""Find changed settings of a resumed run that would change the student.

A key that is in none of the lists below is assumed to change the student.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nemo_kd.data.resumed import WEIGHTS, same_weights
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.spelling import did_you_mean

Settings = Mapping[str, Any]
"""A configuration, either nested, or flat (dotted key → value)."""

LAYOUT = ("model.tensor_model_parallel_size", "model.pipeline_model_parallel_size")
"""Keys that a resumed run may change, unless it trains adapters."""

NEW_RUN = "set exp_manager.explicit_log_dir to a new directory for another run"

REMOVED = (("model.kd.top_entropy_fraction", 1.0),)
"""Settings of earlier versions, with the only values that a run can be continued with."""

FREE = (
    "name",
    "output",
    "resume.*",
    # No effect on the training. The length of a run is compared separately.
    "exp_manager.*",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.logger",
    "trainer.log_every_n_steps",
    "trainer.enable_*",
    "trainer.profiler",
    "trainer.detect_anomaly",
    "trainer.default_root_dir",
    "trainer.use_distributed_sampler",
    "trainer.limit_test_batches",
    "trainer.limit_predict_batches",
    "model.save_nemo_on_validation_end",
    "model.nsys_profile*",
    "model.memory_profile*",
    "model.gc_interval",
    "model.dist_ckpt_*",
    # Affect where and how numbers are computed, but not the numbers, up to rounding.
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.benchmark",
    "trainer.deterministic",
    *LAYOUT,
    "model.context_parallel_size",
    "model.sequence_parallel",
    "model.activations_checkpoint_*",
    "model.gradient_as_bucket_view",
    "model.kd.fused_lm_head",
    "model.optim.overlap_*",
    "model.optim.bucket_cap_mb",
    "model.data.*.num_workers",
    "model.data.*.memmap_workers",
    "model.data.*.pin_memory",
    "model.data.*.index_mapping_dir",
    # Compared by the contents of the files, not by their paths.
    "model.restore_from_path",
    "model.peft.restore_from_path",
    "model.data.train_ds.store",
    "model.data.train_ds.file_names",
    "model.data.test_ds.*",
)
LIMIT = "trainer.limit_val_batches"
VALIDATION = (
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    LIMIT,
    "trainer.num_sanity_val_steps",
    "model.data.validation_drop_last",
    "model.data.validation_ds.*",
    "exp_manager.early_stopping_callback_params.*",
    "exp_manager.checkpoint_callback_params.monitor",
    "exp_manager.checkpoint_callback_params.mode",
)
"""Keys that a resumed run may change, unless validation selects the student or ends the run."""

CHOOSES_BY_VALIDATION = (
    "exp_manager.create_early_stopping_callback",
    "exp_manager.checkpoint_callback_params.save_best_model",
)
COUNTED = ("exp_manager.ema.*", *CHOOSES_BY_VALIDATION)
"""Keys that are compared although a pattern of `FREE` matches them."""

MICRO_BATCH = ("model.micro_batch_size", "model.data.train_ds.micro_batch_size")
DATA_PARALLEL = "data_parallel_size"
"""Data-parallel size, compared as if it were a key of the configuration."""

FIXED = {
    "model.restore_from_path": "the weights come from the checkpoint",
    "model.peft.*": "the adapters come from the checkpoint",
    **dict.fromkeys(LAYOUT, "NeMo's checkpoints of adapters are split for their layout"),
    "model.optim.name": "the optimizer's state comes from the checkpoint",
    "model.megatron_amp_O2": "the optimizer's state comes from the checkpoint",
}
"""Keys that a resumed run cannot change → why; other changes take effect if allowed."""


@dataclass(frozen=True)
class Change:
    """A setting that differs between a checkpoint and the run that would resume it."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        shown = "null, the default," if self.key.startswith("model.kd.") else "null"
        then, now = (shown if value is None else value for value in (self.then, self.now))
        return f"{self.key}: {then} in the checkpoint, {now} now"


def changes(then: Settings, now: Settings, raw: Settings | None = None) -> list[Change]:
    """Return the settings that differ and may change the student, sorted by key.

    `then` and `now` are complete configurations, nested and resolved; a missing key is null. `raw`
    is `now` with interpolations: a key that only refers to another differing key is left out.
    """
    old, new, links = flatten(then), flatten(now), flatten(raw or {})
    old = {key: value for key, value in old.items() if (key, value) not in REMOVED}
    old, new = ({**flat, DATA_PARALLEL: _data_parallel_size(flat)} for flat in (old, new))
    keys = sorted(old.keys() | new.keys())
    differ = {key for key in keys if _differ(key, old.get(key), new.get(key))}
    if same_weights(_weights(old), _weights(new)):
        differ -= {f"model.kd.{name}" for name in WEIGHTS}
    return [
        Change(key, old.get(key), new.get(key))
        for key in keys
        if key in differ
        and not (is_free(key, old) and is_free(key, new))
        and _source(links.get(key)) not in differ
    ]


def _differ(key: str, old: Any, new: Any) -> bool:
    """Whether two values differ; 1 is one batch, but 1.0 all batches."""
    return bool(old != new) or (key == LIMIT and type(old) is not type(new))


def is_free(key: str, flat: Settings) -> bool:
    """Whether `key` cannot change the student of a run with these settings (flat)."""
    if matches(key, COUNTED):
        return False
    if key in LAYOUT and flat.get("model.peft.peft_scheme") not in (None, "none"):
        return False
    if matches(key, VALIDATION):
        return not any(flat.get(choice) for choice in CHOOSES_BY_VALIDATION)
    if key == DATA_PARALLEL:
        size = flat.get(MICRO_BATCH[1]) or flat.get(MICRO_BATCH[0])
        return size == 1 or not _depends_on_micro_batches(flat)
    if key in MICRO_BATCH:
        return not _depends_on_micro_batches(flat)
    return matches(key, FREE)


def check_allowed(allow: Collection[str], *configurations: Settings) -> None:
    """Check that each entry of `resume.allow` is a key of the configurations.

    Errors: NemoKDError for an entry that is not.
    """
    known = {DATA_PARALLEL}
    for configuration in configurations:
        known |= set(flatten(configuration))
    for entry in allow:
        if not any(matches(key, (entry,)) for key in known):
            raise NemoKDError(
                f"resume.allow has {entry}, which is not a key of the configuration"
                f"{did_you_mean(entry, known)}"
            )


def refuse(found: list[Change], allow: Collection[str], fixed: Mapping[str, str], at: str) -> None:
    """Refuse to resume the checkpoint `at` with changes that are not allowed or not possible.

    Errors: NemoKDError that names each change, with both values and the remedy.
    """
    never = [(change, why) for change in found for why in _reason(change.key, fixed)]
    impossible = {change.key for change, _ in never}
    open_ = [c for c in found if c.key not in impossible and not matches(c.key, allow)]
    if not never and not open_:
        return
    named = [*map(str, open_)]
    named += [f"{change}, and a resumed run cannot change it: {why}" for change, why in never]
    remedy = NEW_RUN
    if not never:
        keys = ",".join(change.key for change in open_)
        remedy += f", or resume.allow=[{keys}] to resume this one with the new values"
    raise NemoKDError(f"{at} belongs to a run with other settings: {'; '.join(named)}. {remedy}")


def matches(key: str, patterns: Collection[str]) -> bool:
    """Whether `key` equals one of the patterns, is below one, or matches one with `*`."""
    return any(
        key == pattern or key.startswith(f"{pattern}.") or fnmatchcase(key, pattern)
        for pattern in patterns
    )


def flatten(settings: Settings) -> dict[str, Any]:
    """Convert nested settings to dotted keys; lists are values."""
    return dict(_leaves(settings, ""))


def _leaves(settings: Settings, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{key}.")
        elif not isinstance(value, Mapping):
            yield key, value


def _reason(key: str, fixed: Mapping[str, str]) -> list[str]:
    return [why for pattern, why in fixed.items() if matches(key, (pattern,))][:1]


def _source(value: Any) -> str | None:
    """Return the key that an interpolation refers to: `${a.b}` → `a.b`."""
    found = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return found[1] if found else None


def _depends_on_micro_batches(flat: Settings) -> bool:
    return (flat.get("model.kd.normalize") or KDTrainingConfig.normalize) == "microbatch"


def _data_parallel_size(flat: Settings) -> int | None:
    processes: list[Any] = [flat.get("trainer.devices"), flat.get("trainer.num_nodes") or 1]
    kinds = ("tensor_model", "pipeline_model", "context")
    sizes: list[Any] = [flat.get(f"model.{kind}_parallel_size") or 1 for kind in kinds]
    if not all(isinstance(number, int) for number in (*processes, *sizes)):
        return None
    return int(math.prod(processes) // math.prod(sizes))


def _weights(flat: Settings) -> tuple[float, float]:
    values: Any = {name: flat.get(f"model.kd.{name}") for name in WEIGHTS}
    return KDTrainingConfig(**values).weights
