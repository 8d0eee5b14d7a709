"""What identifies a teacher in a store's spec: its checkpoint, and how its numbers are computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from nemo_kd.store import StoreSpec
from nemo_kd.store.fingerprint import (
    checkpoint_fingerprint,
    of_earlier_version,
    tokenizer_files_fingerprint,
)
from nemo_kd.store.spec import is_greedy


class Settings(Protocol):
    """The blocks of a `DumpConfig`, or of NeMo's configuration with the same keys."""

    @property
    def teacher(self) -> Any: ...
    @property
    def trainer(self) -> Any: ...
    @property
    def model(self) -> Any: ...


def teacher_identity(
    config: Settings, path: Path, name: str | None = None, kind: str | None = None
) -> dict[str, Any]:
    """Return `teacher` of the store's spec for the checkpoint at `path`.

    `kind`: who reads it, if that is not `teacher.kind`.

    In float32 every kind of teacher writes the same store. In a lower precision the numbers also
    depend on which weights are rounded and by whom: only then are `weights` (`megatron_amp_O2`) and
    `kind` recorded, and `kind` only where two kinds read the same checkpoint.
    """
    precision, kind = str(config.trainer.precision), kind or config.teacher.kind
    identity = {
        "name": name or path.name,
        "fingerprint": checkpoint_fingerprint(path),
        "precision": precision,
    }
    if kind == "mcore" and config.teacher.tokenizer is not None:
        # Its files are not the checkpoint's.
        directory = Path(str(config.teacher.tokenizer))
        identity["tokenizer"] = tokenizer_files_fingerprint(directory)
    dtype = precision.partition("-")[0]
    if dtype != "32" and kind in ("mcore", "bridge") and _is_of_another_kind(path):
        identity["kind"] = kind
    if dtype != "32" and config.model.megatron_amp_O2:
        identity["weights"] = dtype
    return identity


def as_recorded(spec: StoreSpec, earlier: StoreSpec, checkpoint: Path) -> StoreSpec:
    """Return `spec` with the fingerprint that an earlier version has recorded for its teacher.

    Only if that version would record it for `checkpoint` now.
    """
    then, now = earlier.teacher.get("fingerprint"), spec.teacher.get("fingerprint")
    if not isinstance(then, str) or now is None or not of_earlier_version(then):
        return spec
    *above, name = str(spec.teacher.get("name")).split("/")
    path = checkpoint / name if above else checkpoint  # one of several iterations
    if checkpoint_fingerprint(path, then) != then:
        return spec
    return replace(spec, teacher={**spec.teacher, "fingerprint": then})


def with_idle_seed(spec: StoreSpec, earlier: StoreSpec) -> StoreSpec:
    """Return `spec` with the seed that an earlier version has recorded for a greedy generation.

    It decides nothing there; specs have its default since.
    """
    if not (is_greedy(spec.template) and is_greedy(earlier.template)):
        return spec
    now, then = (one.template["generation"] for one in (spec, earlier))
    generation = {**now, "seed": then.get("seed", now.get("seed"))}
    return replace(spec, template={**spec.template, "generation": generation})


def _is_of_another_kind(path: Path) -> bool:
    """Whether `nemo` or `hf` reads it too: a .nemo, a .gguf or a Hugging Face directory."""
    return path.is_file() or any((path / f).is_file() for f in ("config.json", "model_config.yaml"))
