"""Derive stores from stores: convert to another profile or a smaller K, merge, split.

Merging and splitting copy the encoded arrays bit for bit; merging also renumbers rows. Converting
to another profile or K decodes and re-encodes, which incurs the quantization errors of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from nemo_kd.errors import StoreError
from nemo_kd.outputs import refuse_inputs
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.manifest import Manifest
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Sample
from nemo_kd.store.shard import Encoded
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.splitmix import GOLDEN, counter, unit
from nemo_kd.store.target import new_store
from nemo_kd.store.writer import ShardWriter, StoreWriter

Item = TypeVar("Item")
Progress = Callable[[int], None]
"""Callback that receives the number of samples written so far."""

# Spec fields in which merged stores may differ; a tokenizer is identified by its fingerprint.
MAY_DIFFER = ("source", "tokenizer.path")


def write_samples(
    samples: Iterable[Sample],
    directory: str | Path,
    spec: StoreSpec,
    *,
    segment_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write samples, given in ascending row order, to a new store.

    The store appears in `directory` once it is complete. With `overwrite` it replaces a store that
    is there, and nothing else.
    `segment_bytes`: approximate size of a segment; None: 1 GiB, or 1/64 of a larger store.
    """
    with new_store(directory, overwrite) as new:
        rows = ((sample.row, sample) for sample in samples)
        return _write(StoreWriter(new, spec), rows, _add_sample, progress, segment_bytes)


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
) -> Manifest:
    """Write the samples of a store in another profile, with the first `top_k` logits per token.

    None keeps the store's value; a new profile, however, starts without options. If profile,
    options and K are unchanged, samples are copied bit for bit.
    """
    refuse_inputs([directory], [store.directory])
    old = store.spec
    profile = old.profile if profile is None else profile
    if profile_options is None:
        profile_options = old.profile_options if profile == old.profile else {}
    k = old.top_k if top_k is None else top_k
    if k > old.top_k:
        raise StoreError(
            f"{store.directory} holds {old.top_k} logits per token, but top_k is {k}; lower it, or "
            "dump again"
        )
    if (profile == Sampled.name) != (old.profile == Sampled.name):
        raise StoreError(
            f"{store.directory} has the profile {old.profile}, which cannot be converted to "
            f"{profile}: draws from the full distribution are made at the dump"
        )
    spec = replace(
        old,
        top_k=k,
        profile=profile,
        profile_options=profile_options,
    )
    if spec == old:
        with new_store(directory, overwrite) as new:
            encoded = ((one[0].row, one) for one in _encoded(store))
            return _write(StoreWriter(new, spec), encoded, _add_encoded, progress, segment_bytes)
    samples = (_cut(store[i], k) for i in range(len(store)))
    return write_samples(
        samples,
        directory,
        spec,
        segment_bytes=segment_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def merge(
    stores: Sequence[Store],
    directory: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Concatenate the samples of several stores into one store.

    Row r of a store becomes row `r + offset`; the offset is the sum of (last row + 1) over the
    preceding stores. `spec.source` records each store's source and offset.
    """
    refuse_inputs([directory], [store.directory for store in stores])
    first = stores[0]
    for other in stores[1:]:
        _refuse_unlike(first, other)
    ends = [int(store.rows[-1]) + 1 if len(store) else 0 for store in stores]
    offsets = [0, *accumulate(ends)][:-1]
    parts = [
        {"offset": offset, "store": store.fingerprint, "source": store.spec.source}
        for store, offset in zip(stores, offsets, strict=True)
    ]
    spec = replace(first.spec, source={"merged": parts})
    rows = (
        (tokens.row + offset, (tokens, arrays))
        for store, offset in zip(stores, offsets, strict=True)
        for tokens, arrays in _encoded(store)
    )
    with new_store(directory, overwrite) as new:
        return _write(StoreWriter(new, spec), rows, _add_encoded, progress)


def split(
    store: Store,
    directories: Sequence[str | Path],
    weights: Sequence[float],
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Manifest]:
    """Randomly split a store into parts with the given relative weights.

    A sample's part depends only on the seed and its row number, so that stores with the same rows
    are split identically. Rows keep their numbers. The parts appear once all are complete.
    """
    if len(weights) != len(directories) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise StoreError(
            f"weights must be {len(directories)} non-negative numbers, one per directory, with a "
            f"positive sum, not {list(weights)}"
        )
    refuse_inputs(directories, [store.directory])
    bounds = [end / sum(weights) for end in accumulate(weights)]
    manifests = []
    with ExitStack() as stack:
        new = [stack.enter_context(new_store(one, overwrite)) for one in directories]
        for part, directory in enumerate(new):
            note = {"part": part, "weights": [*weights], "seed": seed, "store": store.fingerprint}
            rows = (
                (tokens.row, (tokens, arrays))
                for tokens, arrays in _encoded(store)
                if _part(seed, tokens.row, bounds) == part
            )
            spec = replace(store.spec, source={**store.spec.source, "split": note})
            manifests.append(_write(StoreWriter(directory, spec), rows, _add_encoded, progress))
    return manifests


def _write(
    writer: StoreWriter,
    rows: Iterable[tuple[int, Item]],
    add: Callable[[ShardWriter, int, Item], None],
    progress: Progress | None,
    segment_bytes: int | None = None,
) -> Manifest:
    """Write each (row, item) to the shard of its row, and an empty shard where no row falls."""
    stream = iter(rows)
    pending = next(stream, None)
    done = shard_index = 0
    while pending is not None:
        with writer.shard(shard_index) as shard:
            end = (shard_index + 1) * writer.spec.rows_per_shard
            while pending is not None and pending[0] < end:
                row, item = pending
                add(shard, row, item)
                done += 1
                pending = next(stream, None)
        shard_index += 1
        if progress is not None:
            progress(done)
    return writer.finish(shard_index, segment_bytes)


def _add_sample(shard: ShardWriter, row: int, sample: Sample) -> None:
    shard.add(sample)


def _add_encoded(shard: ShardWriter, row: int, encoded: Encoded) -> None:
    tokens, arrays = encoded
    shard.add_encoded(replace(tokens, row=row), arrays)


def _encoded(store: Store) -> Iterator[Encoded]:
    for number, info in enumerate(store.manifest.parts):
        for index in range(info.samples):
            yield store.part(number).encoded(index)


def _cut(sample: Sample, top_k: int) -> Sample:
    topk = sample.topk
    cut = replace(topk, ids=topk.ids[:, :top_k], logits=topk.logits[:, :top_k])
    return replace(sample, topk=cut)


def _refuse_unlike(first: Store, other: Store) -> None:
    found = first.spec.differences(other.spec)
    unlike = [d for d in found if not {d[0], d[0].split(".")[0]} & {*MAY_DIFFER}]
    if unlike:
        lines = "\n".join(f"  {name}: {a!r} and {b!r}" for name, a, b in unlike)
        raise StoreError(
            f"{first.directory} and {other.directory} cannot be merged; they differ in\n{lines}"
        )


def _part(seed: int, row: int, bounds: Sequence[float]) -> int:
    (share,) = unit(counter(seed * 0xD1342543DE82EF95 + row * GOLDEN))
    return next(i for i, bound in enumerate(bounds) if share < bound)
