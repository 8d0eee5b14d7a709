"""What `nemo-kd convert` does in its three directions, and `merge --average`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_kd.cli.tokenizers import load_tokenizer
from nemo_kd.sft.tokenizer import tokenizer_fingerprint
from nemo_kd.store import Manifest, Sample, Store, StoreError, StoreSpec, read_jsonl, write_jsonl
from nemo_kd.store.spec import ROWS_PER_SHARD
from nemo_kd.store.tools.agreement import Agreement
from nemo_kd.store.tools.average import average
from nemo_kd.store.tools.chunks import CHUNK_ID, chunk_paths, existing_chunks
from nemo_kd.store.tools.jsonl import Padding
from nemo_kd.store.tools.stats import stats
from nemo_kd.store.tools.transform import convert, write_samples

ON_BAD_LINES = ("stop", "skip")
MOST_PADDING_MASS = 0.01
"""Of a trained teacher's probability, a mean answer token; padding has next to none."""
MASS_SAMPLES = 64  # evenly spaced, read to say what a conversion cost
_PROFILE = ("--profile", "--p", "--top-k", "--rows-per-shard")
OPTIONS = {
    "from a store to JSONL": ("--samples-per-chunk",),
    "from JSONL to a store": (*_PROFILE, "--tokenizer", "--bad-lines", "--renumber"),
    "from a store to a store": _PROFILE,
}


def refuse_idle_options(source: str, target: str, given: Mapping[str, Any]) -> None:
    """Refuse options that do nothing in the direction that `source` and `target` ask for."""
    if source.endswith(".jsonl") and target.endswith(".jsonl"):
        raise StoreError(f"{source} and {target} are both JSONL; convert to a store in between")
    to_jsonl, from_jsonl = target.endswith(".jsonl"), source.endswith(".jsonl")
    first, second = ("JSONL" if it else "a store" for it in (from_jsonl, to_jsonl))
    direction = f"from {first} to {second}"
    idle = [n for n, value in given.items() if value is not None and n not in OPTIONS[direction]]
    if idle:
        raise StoreError(
            f"{', '.join(idle)} has no effect {direction}; leave it out, or convert in two steps "
            f"(what this direction knows: {', '.join(OPTIONS[direction])})"
        )


def to_jsonl(
    source: str, target: str, samples_per_chunk: int | None, *, overwrite: bool
) -> dict[str, Any]:
    """Store → NeMo-Aligner's JSONL."""
    chunked = CHUNK_ID in target
    there = [p for _, p in sorted(existing_chunks(target).items())] if chunked else [Path(target)]
    if any(path.exists() for path in there) and not overwrite:
        raise StoreError(
            f"{there[0]} is there already; give --overwrite to replace it"
            f"{' and all other chunks of that name' if chunked else ''}"
        )
    written = write_jsonl(target, Store(source), samples_per_chunk=samples_per_chunk)
    return {"written": target, "samples": written}


def between_stores(
    source: str, target: str, *, advance: Callable[[int, int], None], **changes: Any
) -> dict[str, Any]:
    """Store → store; with what it changed, and the teacher's mass that is kept before and after."""
    store = Store(source)
    manifest = convert(store, target, progress=lambda done: advance(done, len(store)), **changes)
    differences = store.manifest.spec.differences(manifest.spec)
    said = ", ".join(f"{name} {was} → {now}" for name, was, now in differences)
    result = {**summary(target, manifest), "changed": said or "nothing"}
    if {name.split(".")[0] for name, _, _ in differences} & {"profile", "profile_options", "top_k"}:
        result["mass_before"] = _mass(store)
        result["mass_after"] = _mass(Store(target))
    return result


def _mass(store: Store) -> float:
    """The mean probability that an answer token's ids hold, over samples from the whole store."""
    value = stats(store, MASS_SAMPLES)
    return round(value.mass / max(value.tokens, 1), 4)


def averaged(
    stores: Sequence[Store], target: Path, weights: list[float], **options: Any
) -> dict[str, Any]:
    """Stores of several teachers → the store of their mixture."""
    manifest = average(stores, target, weights, **options)
    unlike = {name for store in stores for name in _unlike_profile(stores[0], store)}
    of_first = {"as_in_the_first_store": ", ".join(sorted(unlike))} if unlike else {}
    others = {t for store in stores for t in store.manifest.spec.temperatures} - {1.0}
    left_out = {"temperatures_left_out": sorted(others)} if others else {}
    return {**summary(target, manifest), **left_out, **of_first}


def _unlike_profile(first: Store, other: Store) -> list[str]:
    """The fields in which stores of one mixture may differ, and here do."""
    differences = first.manifest.spec.differences(other.manifest.spec)
    of_profile = ("profile", "profile_options", "top_k", "rows_per_shard")
    return [name for name, _, _ in differences if name.split(".")[0] in of_profile]


def from_jsonl(
    source: str,
    target: str,
    *,
    profile: str | None,
    profile_options: dict[str, Any] | None,
    top_k: int | None,
    rows_per_shard: int | None,
    tokenizer: str | None,
    bad_lines: str | None,
    renumber: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """NeMo-Aligner's JSONL → store. The tokenizer is asked for: training compares it."""
    if bad_lines not in (None, *ON_BAD_LINES):
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
        rows_per_shard=ROWS_PER_SHARD if rows_per_shard is None else rows_per_shard,
        profile="plain" if profile is None else profile,
        profile_options=profile_options or {},
        tokenizer={"fingerprint": tokenizer_fingerprint(loaded), "path": tokenizer},
        source={"name": Path(source).name, "format": "NeMo-Aligner JSONL"},
    )
    skipped: list[StoreError] = []

    def skip(error: StoreError) -> None:
        skipped.append(error)
        print(f"skipped: {error}", file=sys.stderr)

    padding, agreement = Padding(), Agreement()

    def samples() -> Iterator[Sample]:
        nonlocal agreement
        on_bad_line = skip if bad_lines == "skip" else None
        for sample in read_jsonl(
            source, spec, renumber=renumber, on_bad_line=on_bad_line, padding=padding
        ):
            agreement += Agreement.of_sample(sample, spec)
            yield sample

    manifest = write_samples(samples(), target, spec, overwrite=overwrite)
    for warning in (agreement.warning(), _padding_warning(padding, agreement.tokens, tokenizer)):
        if warning:
            print(f"WARNING: {source}: {warning}", file=sys.stderr)
    return {
        **summary(target, manifest),
        "skipped_lines": len(skipped),
        "padding_ids_dropped": padding.ids,
        **agreement.to_json(),
    }


def _padding_warning(padding: Padding, tokens: float, tokenizer: str) -> str:
    if padding.mass <= MOST_PADDING_MASS * tokens:
        return ""
    return (
        f"ids beyond the tokenizer's vocabulary held {padding.mass / max(tokens, 1):.1%} of the "
        f"teacher's probability, and were dropped: too much for padding; is {tokenizer} its "
        "tokenizer?"
    )


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
    spec = manifest.spec
    kept = {"profile": spec.profile, "top_k": spec.top_k}
    return {
        "written": str(target),
        "fingerprint": manifest.fingerprint,
        **kept,
        **manifest.totals,
    }


def numbers(option: str, text: str) -> list[float]:
    """A comma-separated list of numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise StoreError(f"{option} wants numbers with commas between, not {text!r}") from error
