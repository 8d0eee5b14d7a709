"""Implementation of `nemo-kd convert`, in all its directions, and `nemo-kd average`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_kd.cli.tokenizers import load_tokenizer
from nemo_kd.outputs import refuse_directory, refuse_inputs
from nemo_kd.sft.tokenizer import tokenizer_fingerprint
from nemo_kd.store import (
    Manifest,
    Sample,
    Store,
    StoreError,
    StoreSpec,
    average,
    convert,
    read_jsonl,
    stats,
    write_jsonl,
    write_samples,
)
from nemo_kd.store.tools.agreement import Agreement
from nemo_kd.store.tools.chunks import CHUNK_ID, chunk_path, chunk_paths, existing_chunks
from nemo_kd.store.tools.jsonl import Padding, lines_of, record_of
from nemo_kd.store.tools.parquet import read_parquet, spec_of, widest, write_parquet
from nemo_kd.store.tools.selection import check_intact
from nemo_kd.visible import visible

ON_BAD_LINES = ("error", "drop")
MAX_PADDING_MASS = 0.01
"""Highest plausible mean probability per answer token of padding ids for a trained teacher."""
MASS_SAMPLES = 64  # evenly spaced samples read to measure the mass that a conversion lost
_PROFILE = ("--profile", "--p", "--top-k", "--segment-bytes")
OPTIONS = {
    "from a store to JSONL": ("--samples-per-chunk",),
    "from a store to Parquet": (),
    "from JSONL to a store": (*_PROFILE, "--tokenizer", "--bad-lines", "--renumber"),
    "from Parquet to a store": (*_PROFILE, "--tokenizer"),
    "from a store to a store": _PROFILE,
}
KINDS = {".jsonl": "JSONL", ".parquet": "Parquet"}


def refuse_idle_options(source: str, target: str, given: Mapping[str, Any]) -> None:
    """Raise StoreError for options that have no effect in this direction of conversion."""
    first, second = kind_of(source), kind_of(target)
    direction = f"from {first} to {second}"
    if direction not in OPTIONS:
        raise StoreError(f"{source} is {first}, {target} {second}; convert to a store first")
    idle = [n for n, value in given.items() if value is not None and n not in OPTIONS[direction]]
    if idle:
        raise StoreError(
            f"{', '.join(idle)} has no effect {direction}, where the options are "
            f"{', '.join(OPTIONS[direction]) or 'none'}; omit it, or convert in two steps"
        )


def kind_of(path: str) -> str:
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
    check_intact(store)
    written = write_jsonl(target, store, samples_per_chunk=samples_per_chunk)
    return {"written": target, "samples": written}


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
    if recorded is None:
        if tokenizer is None:
            raise StoreError(_needs_tokenizer(source))
        recorded = StoreSpec(
            top_k=max(widest(source), 1) if top_k is None else top_k,
            vocab_size=load_tokenizer(tokenizer).vocab_size,
            tokenizer=_identified(tokenizer),
            source={"name": Path(source).name, "format": "Parquet"},
        )
    elif tokenizer is not None:
        raise StoreError(f"--tokenizer has no effect: {source} records its own")
    spec = replace(
        recorded,
        top_k=recorded.top_k if top_k is None else top_k,
        profile=recorded.profile if profile is None else profile,
        profile_options=(
            (profile_options or {})
            if profile not in (None, recorded.profile) or profile_options is not None
            else recorded.profile_options
        ),
    )
    manifest = write_samples(
        read_parquet(source, spec), target, spec, segment_bytes=segment_bytes, overwrite=overwrite
    )
    return summary(target, manifest)


def _needs_tokenizer(source: str) -> str:
    return (
        f"{source} does not record its tokenizer; give its directory or .model file with "
        "--tokenizer"
    )


def _identified(tokenizer: str) -> dict[str, Any]:
    """Return what a store's spec records of a tokenizer."""
    fingerprint = tokenizer_fingerprint(load_tokenizer(tokenizer))
    return {"fingerprint": fingerprint, "path": str(Path(tokenizer).absolute())}


def between_stores(
    source: str, target: str, *, advance: Callable[[int, int], None], **changes: Any
) -> dict[str, Any]:
    """Convert a store to another store; report changed fields and the mass before and after."""
    store = Store(source)
    manifest = convert(store, target, progress=lambda done: advance(done, len(store)), **changes)
    differences = store.spec.differences(manifest.spec)
    changed = ", ".join(f"{name} {was} → {now}" for name, was, now in differences)
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
    stores: Sequence[Store], target: Path, weights: list[float], **options: Any
) -> dict[str, Any]:
    """Write the mixture of several teachers; report fields in which their stores differ."""
    manifest = average(stores, target, weights, **options)
    unlike = {name for store in stores for name in _unlike_profile(stores[0], store)}
    of_first = {"as_in_the_first_store": ", ".join(sorted(unlike))} if unlike else {}
    others = {t for store in stores for t in store.spec.temperatures} - {1.0}
    left_out = {"temperatures_left_out": sorted(others)} if others else {}
    return {**summary(target, manifest), **left_out, **of_first}


def _unlike_profile(first: Store, other: Store) -> list[str]:
    """Return the fields of profile and K in which two stores differ."""
    differences = first.spec.differences(other.spec)
    of_profile = ("profile", "profile_options", "top_k")
    return [name for name, _, _ in differences if name.split(".")[0] in of_profile]


def from_jsonl(
    source: str,
    target: str,
    *,
    profile: str | None,
    profile_options: dict[str, Any] | None,
    top_k: int | None,
    segment_bytes: int | None,
    tokenizer: str | None,
    bad_lines: str | None,
    renumber: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Convert NeMo-Aligner's JSONL to a store.

    The tokenizer is required because the store records its fingerprint, which training compares
    with that of the student's tokenizer.
    """
    if bad_lines not in (None, *ON_BAD_LINES):
        raise StoreError(f"--bad-lines must be {' or '.join(ON_BAD_LINES)}, not {bad_lines!r}")
    for path in chunk_paths(source):
        if not path.exists() or path.is_dir():
            raise StoreError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    if tokenizer is None:
        raise StoreError(_needs_tokenizer(source))
    refuse_inputs([target], [*chunk_paths(source), tokenizer])
    loaded = load_tokenizer(tokenizer)
    spec = StoreSpec(
        top_k=first_top_k(source) if top_k is None else top_k,
        vocab_size=loaded.vocab_size,
        profile="plain" if profile is None else profile,
        profile_options=profile_options or {},
        tokenizer=_identified(tokenizer),
        source={"name": Path(source).name, "format": "NeMo-Aligner JSONL"},
    )
    dropped: list[StoreError] = []

    def drop(error: StoreError) -> None:
        dropped.append(error)
        print(visible(f"dropped: {error}"), file=sys.stderr)

    padding, agreement = Padding(), Agreement()

    def samples() -> Iterator[Sample]:
        nonlocal agreement
        on_bad_line = drop if bad_lines == "drop" else None
        for sample in read_jsonl(
            source, spec, renumber=renumber, on_bad_line=on_bad_line, padding=padding
        ):
            agreement += Agreement.of_sample(sample, spec)
            yield sample

    manifest = write_samples(
        samples(), target, spec, segment_bytes=segment_bytes, overwrite=overwrite
    )
    for warning in (agreement.warning(), _padding_warning(padding, agreement.tokens, tokenizer)):
        if warning:
            print(visible(f"WARNING: {source}: {warning}"), file=sys.stderr)
    return {
        **summary(target, manifest),
        "dropped_lines": len(dropped),
        "padding_ids_dropped": padding.ids,
        **agreement.to_json(),
    }


def _padding_warning(padding: Padding, tokens: float, tokenizer: str) -> str:
    if padding.mass <= MAX_PADDING_MASS * tokens:
        return ""
    return (
        f"the ids beyond the tokenizer's vocabulary, which were dropped, had "
        f"{padding.mass / max(tokens, 1):.1%} of the teacher's probability, too much for padding; "
        f"check that {tokenizer} is its tokenizer"
    )


def first_top_k(source: str) -> int:
    """Return the K of the first line that contains a top-K."""
    for path in chunk_paths(source):
        for _, line in lines_of(path):
            found = _top_k(line)
            if found:
                return found
    raise StoreError(f"{source}: no line has topk_token_ids, as NeMo-Aligner's JSONL does")


def _top_k(line: bytes) -> int:
    try:
        return len(record_of(line)["topk_token_ids"][0])
    except (StoreError, KeyError, IndexError, TypeError):
        return 0


def summary(target: str | Path, manifest: Manifest) -> dict[str, Any]:
    """Return the values that a command reports about a store it wrote."""
    spec = manifest.spec
    kept = {"profile": spec.profile, "top_k": spec.top_k}
    return {
        "written": str(target),
        "fingerprint": manifest.fingerprint,
        **kept,
        **manifest.totals,
    }


def numbers(option: str, text: str) -> list[float]:
    """Parse a comma-separated list of numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise StoreError(f"{option} takes comma-separated numbers, not {text!r}") from error
