"""What `nemo-kd convert` does in its three directions, and `merge --average`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_kd.cli.tokenizers import load_tokenizer
from nemo_kd.store import Manifest, Store, StoreError, StoreSpec, read_jsonl, write_jsonl
from nemo_kd.store.average import average
from nemo_kd.store.jsonl import CHUNK_ID, chunk_paths
from nemo_kd.store.spec import ROWS_PER_SHARD
from nemo_kd.store.transform import convert, write_samples
from nemo_kd.tokenizer import tokenizer_fingerprint

ON_BAD_LINES = ("stop", "skip")


def to_jsonl(
    source: str, target: str, samples_per_chunk: int | None, *, overwrite: bool
) -> dict[str, Any]:
    """Store → NeMo-Aligner's JSONL."""
    first = Path(target.replace(CHUNK_ID, "0"))
    if first.exists() and not overwrite:
        raise StoreError(f"{first} is there already; give --overwrite to replace it")
    store = Store(source)
    unit = store.manifest.spec.temperatures.index(1.0)
    written = write_jsonl(target, store, unit_temperature=unit, samples_per_chunk=samples_per_chunk)
    return {"written": target, "samples": written}


def between_stores(
    source: str, target: str, *, advance: Callable[[int, int], None], **changes: Any
) -> dict[str, Any]:
    """Store → store."""
    store = Store(source)
    manifest = convert(store, target, progress=lambda done: advance(done, len(store)), **changes)
    return summary(target, manifest)


def averaged(
    stores: Sequence[Store], target: Path, weights: list[float], **options: Any
) -> dict[str, Any]:
    """Stores of several teachers → the store of their mixture."""
    manifest = average(stores, target, weights, **options)
    others = {t for store in stores for t in store.manifest.spec.temperatures} - {1.0}
    left_out = {"temperatures_left_out": sorted(others)} if others else {}
    return {**summary(target, manifest), **left_out}


def from_jsonl(
    source: str,
    target: str,
    *,
    profile: str,
    profile_options: dict[str, Any],
    top_k: int | None,
    rows_per_shard: int | None,
    tokenizer: str | None,
    bad_lines: str,
    renumber: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """NeMo-Aligner's JSONL → store. The tokenizer is asked for: training compares it."""
    if bad_lines not in ON_BAD_LINES:
        raise StoreError(f"--bad-lines is one of {', '.join(ON_BAD_LINES)}, not {bad_lines!r}")
    for path in chunk_paths(source):
        if not path.exists() or path.is_dir():
            raise StoreError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    if tokenizer is None:
        raise StoreError(
            f"{source} does not say which tokenizer made it; give its directory or .model file "
            "with --tokenizer"
        )
    loaded = load_tokenizer(tokenizer)
    spec = StoreSpec(
        top_k=first_top_k(source) if top_k is None else top_k,
        vocab_size=loaded.vocab_size,
        rows_per_shard=rows_per_shard or ROWS_PER_SHARD,
        profile=profile,
        profile_options=profile_options,
        tokenizer={"fingerprint": tokenizer_fingerprint(loaded), "path": tokenizer},
        source={"name": Path(source).name, "format": "NeMo-Aligner JSONL"},
    )
    skipped: list[StoreError] = []

    def skip(error: StoreError) -> None:
        skipped.append(error)
        print(f"skipped: {error}", file=sys.stderr)

    samples = read_jsonl(
        source, spec, renumber=renumber, on_bad_line=skip if bad_lines == "skip" else None
    )
    manifest = write_samples(samples, target, spec, overwrite=overwrite)
    return {**summary(target, manifest), "skipped_lines": len(skipped)}


def first_top_k(source: str) -> int:
    """K of the first line that has one."""
    for path in chunk_paths(source):
        try:
            with path.open("rb") as file:
                for line in file:
                    found = _top_k(line)
                    if found:
                        return found
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error})") from error
    raise StoreError(f"{source}: no line has topk_token_ids; is it NeMo-Aligner's JSONL?")


def _top_k(line: bytes) -> int:
    try:
        return len(json.loads(line)["topk_token_ids"][0])
    except (ValueError, KeyError, IndexError, TypeError):
        return 0


def summary(target: str | Path, manifest: Manifest) -> dict[str, Any]:
    return {"written": str(target), "fingerprint": manifest.fingerprint, **manifest.totals}


def numbers(option: str, text: str) -> list[float]:
    """A comma-separated list of numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise StoreError(f"{option} wants numbers with commas between, not {text!r}") from error
