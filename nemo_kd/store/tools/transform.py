"""Write stores from samples, and from stores: convert to another profile or K, merge, split.

Merging and splitting copy the encoded arrays bit for bit; merging also renumbers rows. Converting
to another profile or K decodes and re-encodes, which incurs the quantization errors of both; the
spec records conversions that lose something (`converted`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.outputs import refuse_inputs
from nemo_kd.store.codecs import Sampled, TopP
from nemo_kd.store.fingerprint import of_earlier_version
from nemo_kd.store.manifest import Manifest
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import EncodedSample, Sample
from nemo_kd.store.segments import MOST_ROWS
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.splitmix import GOLDEN, counter, mixed, unit
from nemo_kd.store.target import new_store
from nemo_kd.store.tools.converted import CONVERTED, NOTE, after, largest_p
from nemo_kd.store.tools.overlap import in_common, refuse_twice
from nemo_kd.store.tools.selection import Progress, Selection, check_intact, copy
from nemo_kd.store.writer import StoreWriter

# Spec fields in which merged stores may differ, but not in the conversions that `source` records; a
# tokenizer is identified by its fingerprint.
MAY_DIFFER = ("source", "tokenizer.path")
SHARDS_PER_SAMPLE, FREE_SHARDS = 4, 400
"""Up to `SHARDS_PER_SAMPLE * samples + FREE_SHARDS` shards are written, most of them empty."""


def write_samples(
    samples: Iterable[Sample | EncodedSample],
    directory: str | Path,
    spec: StoreSpec,
    *,
    segment_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write samples, given in ascending row order, to a new store.

    The store appears in `directory` once it is complete. With `overwrite` it replaces a store that
    is there, and nothing else. Raises StoreError for a row far beyond the number of samples.
    `segment_bytes`: approximate size of a segment; None: 1 GiB, or 1/64 of a larger store.
    """
    with new_store(directory, overwrite) as new:
        return _write(StoreWriter(new, spec), samples, progress, segment_bytes)


def convert(
    store: Store,
    directory: str | Path,
    *,
    profile: str | None = None,
    profile_options: dict[str, Any] | None = None,
    top_k: int | None = None,
    segment_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    jobs: int = 1,
) -> Manifest:
    """Write the samples of a store in another profile, with the first `top_k` logits per token.

    None keeps the store's value; a new profile, however, starts without options. If profile,
    options and K are unchanged, samples are copied bit for bit. `jobs`: number of processes, 0 for
    one per core if the store is large.
    """
    refuse_inputs([directory], [store.directory])
    spec = converted_spec(store.spec, profile, profile_options, top_k)
    refuse_more(store.directory, store.spec, spec)
    with new_store(directory, overwrite) as new:
        check_intact(store, jobs)
        return copy(
            Selection.of(store),
            new,
            spec,
            segment_bytes=segment_bytes,
            progress=progress,
            jobs=jobs,
        )


def converted_spec(
    old: StoreSpec,
    profile: str | None,
    profile_options: dict[str, Any] | None,
    top_k: int | None,
) -> StoreSpec:
    """Return `old` with what is not None replaced; a new profile starts without options.

    `source.converted` records a conversion that loses something.
    """
    profile = old.profile if profile is None else profile
    if profile_options is None:
        profile_options = old.profile_options if profile == old.profile else {}
    new = replace(
        old,
        top_k=old.top_k if top_k is None else top_k,
        profile=profile,
        profile_options=profile_options,
    )
    return replace(new, source=after(old, new))


def refuse_more(source: str | Path, old: StoreSpec, new: StoreSpec) -> None:
    """Raise StoreError if what `source` holds of the spec `old` cannot be converted to `new`."""
    if new.top_k > old.top_k:
        raise StoreError(
            f"{source} holds {old.top_k} logits per token, but top_k is {new.top_k}; lower it, or "
            "dump again"
        )
    kept, p = largest_p(old), new.profile_options.get("p", 0)
    if new.profile == TopP.name and kept is not None and p > kept:
        raise StoreError(
            f"{source} holds the logits of p={kept}, but p is {p}; lower it, or dump again"
        )
    drawn = old.profile == Sampled.name
    if drawn != (new.profile == Sampled.name):
        raise StoreError(
            f"{source} has the profile {old.profile}, which cannot be converted to {new.profile}: "
            "draws from the full distribution are made at the dump"
        )
    if drawn and new.top_k < old.top_k:
        raise StoreError(
            f"{source} holds {old.top_k} draws per token, which cannot be reduced to {new.top_k}; "
            f"dump again with dump.top_k={new.top_k}"
        )


def merge(
    stores: Sequence[Store],
    directory: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    jobs: int = 1,
) -> Manifest:
    """Concatenate the samples of several stores into one store.

    Row r of a store becomes row `r + offset`; the offset is the sum of (last row + 1) over the
    preceding stores. `spec.source` records each store's source and offset.
    """
    refuse_inputs([directory], [store.directory for store in stores])
    refuse_twice(stores)
    for sentence in in_common(stores):
        raise StoreError(f"{sentence}; a merged store would have them twice")
    first = stores[0]
    for other in stores[1:]:
        _refuse_unlike(first, other)
    ends = [int(store.rows[-1]) + 1 if len(store) else 0 for store in stores]
    *offsets, end = [0, *accumulate(ends)]
    if end > MOST_ROWS:
        raise StoreError(
            f"the merged store would have row {end - 1}, more than {MOST_ROWS - 1}: one of the "
            "stores has row numbers that cannot be those of a file"
        )
    parts = [
        {"offset": offset, "store": store.fingerprint, "source": store.spec.source}
        for store, offset in zip(stores, offsets, strict=True)
    ]
    alike = {key: first.spec.source[key] for key in (CONVERTED,) if key in first.spec.source}
    spec = replace(first.spec, source={"merged": parts, **alike})
    selection = Selection.concatenated(list(stores), offsets)
    with new_store(directory, overwrite) as new:
        for store in stores:
            check_intact(store, jobs)
        return copy(selection, new, spec, progress=progress, jobs=jobs)


def split(
    store: Store,
    directories: Sequence[str | Path],
    weights: Sequence[float],
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    jobs: int = 1,
) -> list[Manifest]:
    """Randomly split a store into parts with the given relative weights.

    A sample's part depends only on the seed and its row number, so that stores with the same rows
    are split identically; of several answers to a prompt, on the prompt's number, so that they are
    in the same part. A part is split again independently of the split that made it, also with the
    same seed. Rows keep their numbers. The parts appear once all are complete.

    Raises StoreError if a part of positive weight would have no samples.
    """
    if len(weights) != len(directories) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise StoreError(
            f"weights must be {len(directories)} non-negative numbers, one per directory, with a "
            f"positive sum, not {list(weights)}"
        )
    if not -(1 << 63) <= seed < 1 << 63:
        raise StoreError(f"seed={seed} is out of range: give a number from -2^63 to 2^63 - 1")
    refuse_inputs(directories, [store.directory])
    earlier = _splits(store.spec.source, seed)
    parts = _parts(seed, _prompts(store), weights, earlier)
    _refuse_empty(directories, weights, parts)
    manifests, done = [], 0
    with ExitStack() as stack:
        new = [stack.enter_context(new_store(one, overwrite)) for one in directories]
        check_intact(store, jobs)
        for part, directory in enumerate(new):
            note = {"part": part, "weights": [*weights], "seed": seed, "store": store.fingerprint}
            if "split" in store.spec.source:
                note["earlier"] = store.spec.source["split"]
            spec = replace(store.spec, source={**store.spec.source, "split": note})
            selection = Selection.of(store, parts == part)
            manifests.append(
                copy(
                    selection,
                    directory,
                    spec,
                    progress=_after(done, progress),
                    jobs=jobs,
                )
            )
            done += len(selection)
    return manifests


def _write(
    writer: StoreWriter,
    samples: Iterable[Sample | EncodedSample],
    progress: Progress | None,
    segment_bytes: int | None,
) -> Manifest:
    """Write each sample to the shard of its row, and an empty shard where no row falls."""
    stream = iter(samples)
    pending = next(stream, None)
    done = shard_index = 0
    while pending is not None:
        if pending.row // writer.spec.rows_per_shard > SHARDS_PER_SAMPLE * (done + 1) + FREE_SHARDS:
            raise StoreError(
                f"row {pending.row} is far larger than the number of samples so far, {done + 1}, "
                "as if it were no row number; number the samples from 0"
            )
        with writer.shard(shard_index) as shard:
            end = (shard_index + 1) * writer.spec.rows_per_shard
            while pending is not None and pending.row < end:
                shard.add(pending)
                done += 1
                pending = next(stream, None)
        shard_index += 1
        if progress is not None:
            progress(done)
    return writer.finish(shard_index, segment_bytes)


def _refuse_unlike(first: Store, other: Store) -> None:
    found = first.spec.differences(other.spec)
    unlike = [d for d in found if d[0] == NOTE or not {d[0], d[0].split(".")[0]} & {*MAY_DIFFER}]
    if unlike:
        lines = "\n".join(f"  {name}: {a!r} and {b!r}" for name, a, b in unlike)
        teachers = [store.spec.teacher.get("fingerprint") for store in (first, other)]
        if len({of_earlier_version(one) for one in teachers if isinstance(one, str)}) > 1:
            lines += (
                "\nAn earlier version has made one of the fingerprints, in another way: that the "
                "teachers are the same cannot be seen; dump that store again"
            )
        raise StoreError(
            f"{first.directory} and {other.directory} cannot be merged; they differ in\n{lines}"
        )


def _refuse_empty(
    directories: Sequence[str | Path], weights: Sequence[float], parts: NDArray[np.int64]
) -> None:
    """Raise StoreError if a part of positive weight is not among the samples' `parts`."""
    for part, (directory, weight) in enumerate(zip(directories, weights, strict=True)):
        if weight > 0 and not (parts == part).any():
            raise StoreError(
                f"{directory}, of weight {weight:g}, would have none of the {len(parts)} samples; "
                "raise its weight or choose another seed"
            )


def _after(done: int, progress: Progress | None) -> Progress | None:
    """Return a callback that adds the samples that were done before."""
    return None if progress is None else lambda more: progress(done + more)


def _prompts(store: Store) -> NDArray[np.int64]:
    """Return the number of each row's prompt [rows]: the row's, unless prompts have several."""
    rows = store.rows
    answers = store.spec.template.get("generation", {}).get("samples_per_prompt", 1)
    offsets = np.unique([0, *_offsets(store.spec.source)])
    start = offsets[np.searchsorted(offsets, rows, side="right") - 1]
    return start + (rows - start) // answers


def _offsets(source: Mapping[str, Any], start: int = 0) -> Iterator[int]:
    """Yield the first rows of the stores that were merged, also of merged ones among them."""
    for part in source.get("merged", ()):
        yield start + part["offset"]
        yield from _offsets(part["source"], start + part["offset"])


def _splits(source: Mapping[str, Any], seed: int) -> int:
    """Return how often the samples have been split with this seed, also those of merged stores."""
    merged = max((_splits(part["source"], seed) for part in source.get("merged", ())), default=0)
    own, note = 0, source.get("split")
    while note is not None:
        own += note["seed"] == seed
        note = note.get("earlier")
    return merged + own


def _parts(
    seed: int, rows: NDArray[np.int64], weights: Sequence[float], earlier: int = 0
) -> NDArray[np.int64]:
    """Return the part of each row [rows]; independent of the `earlier` splits with this seed."""
    bounds = [end / sum(weights) for end in accumulate(weights)]
    start = counter(seed * 0xD1342543DE82EF95)  # [1]
    for _ in range(earlier):
        start = mixed(start + np.uint64(GOLDEN))
    shares = unit(start + rows.astype(np.uint64) * np.uint64(GOLDEN))
    return np.searchsorted(bounds, shares, side="right")
