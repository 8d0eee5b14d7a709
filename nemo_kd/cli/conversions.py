"""Implementation of `nemo-kd convert`, in all its directions, and `nemo-kd average`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_kd.cli.app import summary
from nemo_kd.cli.caches import (
    CAPTURE,
    RESPONSES,
    SHARDS,
    identified,
    kind_of_source,
    needs_tokenizer,
    refuse_idle_p,
    warned_of_cut,
)
from nemo_kd.cli.tokenizers import load_tokenizer
from nemo_kd.outputs import refuse_directory, refuse_inputs
from nemo_kd.store import (
    Store,
    StoreError,
    StoreSpec,
    average,
    convert,
    stats,
    write_jsonl,
    write_samples,
)
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.tools.chunks import CHUNK_ID, chunk_path, existing_chunks
from nemo_kd.store.tools.converted import NOTE
from nemo_kd.store.tools.parquet import read_parquet, spec_of, widest, write_parquet
from nemo_kd.store.tools.selection import check_intact
from nemo_kd.store.tools.transform import converted_spec, refuse_more

MASS_SAMPLES = 64  # evenly spaced samples read to measure the mass that a conversion lost
_PROFILE = ("--profile", "--p", "--top-k", "--segment-bytes")
_FOREIGN = (*_PROFILE, "--tokenizer", "--bad-lines")
OPTIONS = {
    "from a store to JSONL": ("--samples-per-chunk",),
    "from a store to Parquet": (),
    "from JSONL to a store": (*_FOREIGN, "--renumber"),
    f"from {RESPONSES} to a store": (*_FOREIGN, "--renumber"),
    f"from {CAPTURE} to a store": (*_FOREIGN, "--compression-config"),
    f"from {SHARDS} to a store": (*_FOREIGN, "--data"),
    "from Parquet to a store": (*_PROFILE, "--tokenizer"),
    "from a store to a store": (*_PROFILE, "--jobs"),
}
KINDS = {".jsonl": "JSONL", ".parquet": "Parquet"}


def refuse_idle_options(source: str, target: str, given: Mapping[str, Any]) -> None:
    """Raise StoreError for options that have no effect in this direction of conversion."""
    first, second = kind_of(source), kind_by_suffix(target)
    direction = f"from {first} to {second}"
    if direction not in OPTIONS:
        raise StoreError(f"{source} is {first}, {target} {second}; convert to a store first")
    idle = [n for n, value in given.items() if value is not None and n not in OPTIONS[direction]]
    if idle:
        raise StoreError(
            f"{', '.join(idle)} has no effect {direction}, where the options are "
            f"{', '.join(OPTIONS[direction]) or 'none'}; omit it, or convert in two steps"
        )


def kind_of(source: str) -> str:
    """Return what is at a path: Parquet, another program's cache (JSONL among them) or a store."""
    if found := kind_of_source(source):
        return found
    return "a store" if Path(source).is_dir() else kind_by_suffix(source)


def kind_by_suffix(path: str) -> str:
    """Return what a path names, by its suffix: JSONL, Parquet or a store."""
    return KINDS.get(Path(path).suffix, "a store")


def to_jsonl(
    source: str, target: str, samples_per_chunk: int | None, *, overwrite: bool
) -> dict[str, Any]:
    """Convert a store to NeMo-Aligner's JSONL."""
    chunked = CHUNK_ID in target
    files = [p for _, p in sorted(existing_chunks(target).items())] if chunked else [Path(target)]
    refuse_inputs({*files, chunk_path(target, 0)}, [source])
    if not chunked:
        refuse_directory(Path(target))
    if any(path.exists() for path in files) and not overwrite:
        raise StoreError(
            f"{files[0]} already exists; use --overwrite to replace it"
            f"{' and all other chunks of that name' if chunked else ''}"
        )
    store = Store(source)
    if store.spec.profile == Sampled.name:
        raise StoreError(
            f"{source} has the profile {Sampled.name}, which a JSONL file cannot record: its draws "
            "would be taken for the teacher's top logits; convert it to Parquet"
        )
    check_intact(store)
    written = write_jsonl(target, store, samples_per_chunk=samples_per_chunk)
    return {"written": target, "samples": written, **temperatures_left_out([store])}


def to_parquet(
    source: str, target: str, *, overwrite: bool, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Convert a store to a Parquet file."""
    refuse_inputs([target], [source])
    if Path(target).exists() and not overwrite:
        raise StoreError(f"{target} already exists; use --overwrite to replace it")
    store = Store(source)
    check_intact(store)
    written = write_parquet(target, store, lambda done: advance(done, len(store)))
    return {"written": target, "samples": written}


def from_parquet(
    source: str,
    target: str,
    *,
    profile: str | None,
    profile_options: dict[str, Any] | None,
    top_k: int | None,
    segment_bytes: int | None,
    tokenizer: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Convert a Parquet file to a store: the one that it was made of, unless options change it."""
    refuse_inputs([target], [source, *([tokenizer] if tokenizer else [])])
    recorded = spec_of(source)
    foreign = recorded is None
    if recorded is None:
        if tokenizer is None:
            raise StoreError(needs_tokenizer(source))
        loaded = load_tokenizer(tokenizer)
        recorded = StoreSpec(
            top_k=max(widest(source), 1) if top_k is None else top_k,
            vocab_size=loaded.vocab_size,
            tokenizer=identified(loaded, tokenizer),
            source={"name": Path(source).name, "format": "Parquet"},
        )
    elif tokenizer is not None:
        raise StoreError(f"--tokenizer has no effect: {source} records its own")
    refuse_idle_p(profile_options, profile or recorded.profile)
    spec = converted_spec(recorded, profile, profile_options, top_k)
    if not foreign:
        refuse_more(source, recorded, spec)
    widths = Counter[int]()
    manifest = write_samples(
        read_parquet(source, spec, widths),
        target,
        spec,
        segment_bytes=segment_bytes,
        overwrite=overwrite,
    )
    cut = warned_of_cut(source, widths, spec.top_k if foreign and top_k is None else None)
    return {**summary(target, manifest), **cut}


def between_stores(
    source: str, target: str, *, advance: Callable[[int, int], None], **changes: Any
) -> dict[str, Any]:
    """Convert a store to another store; report changed fields and the mass before and after."""
    store = Store(source)
    refuse_idle_p(changes.get("profile_options"), changes.get("profile") or store.spec.profile)
    manifest = convert(store, target, progress=lambda done: advance(done, len(store)), **changes)
    differences = store.spec.differences(manifest.spec)
    asked = (each for each in differences if each[0] != NOTE)
    changed = ", ".join(f"{name} {was} → {now}" for name, was, now in asked)
    result = {**summary(target, manifest), "changed": changed or "nothing"}
    if {name.split(".")[0] for name, _, _ in differences} & {"profile", "profile_options", "top_k"}:
        result["mass_before"] = _mass(store)
        result["mass_after"] = _mass(Store(target))
    return result


def _mass(store: Store) -> float:
    """Return the mean top-K mass per answer token over evenly spaced samples of the store."""
    value = stats(store, MASS_SAMPLES)
    return round(value.mass / max(value.tokens, 1), 4)


def averaged(
    stores: Sequence[Store], target: str | Path, weights: list[float], **options: Any
) -> dict[str, Any]:
    """Write the mixture of several teachers; report fields in which their stores differ."""
    manifest = average(stores, target, weights, **options)
    unlike = {name for store in stores for name in _unlike_profile(stores[0], store)}
    of_first = {"as_in_the_first_store": ", ".join(sorted(unlike))} if unlike else {}
    return {**summary(target, manifest), **temperatures_left_out(stores), **of_first}


def temperatures_left_out(stores: Sequence[Store]) -> dict[str, Any]:
    """Return what to report of the temperatures of stores that are written at 1.0 only."""
    others = {t for store in stores for t in store.spec.temperatures} - {1.0}
    return {"temperatures_left_out": sorted(others)}


def _unlike_profile(first: Store, other: Store) -> list[str]:
    """Return the fields of profile and K in which two stores differ."""
    differences = first.spec.differences(other.spec)
    of_profile = ("profile", "profile_options", "top_k")
    return [name for name, _, _ in differences if name.split(".")[0] in of_profile]


def numbers(option: str, text: str) -> list[float]:
    """Parse a comma-separated list of numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise StoreError(f"{option} takes comma-separated numbers, not {text!r}") from error
