"""Stores from stores: another profile or fewer logits, several in one, one in parts.

Merging and splitting copy the profile's own arrays, so not a bit of the teacher changes; only row
numbers do in a merge. Converting to another profile or K reads and writes, with the error of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.lock import DirectoryLock
from nemo_kd.store.manifest import MANIFEST, Manifest
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Sample
from nemo_kd.store.shard import Encoded
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.splitmix import GOLDEN, counter, unit
from nemo_kd.store.writer import ShardWriter, StoreWriter

Item = TypeVar("Item")
Progress = Callable[[int], None]
"""Called with the number of samples that are done."""

# Between stores that are merged; a tokenizer's place is for `nemo-kd show`, not what it is.
MAY_DIFFER = ("source", "rows_per_shard", "tokenizer.path")


def write_samples(
    samples: Iterable[Sample],
    directory: str | Path,
    spec: StoreSpec,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """A store of samples that come in rising row order; a shard is begun when a row needs it."""
    with DirectoryLock(directory):
        writer = _open_writer(directory, spec, overwrite)
        return _write(writer, ((s.row, s) for s in samples), _add_sample, progress)


def convert(
    store: Store,
    directory: str | Path,
    *,
    profile: str | None = None,
    profile_options: dict[str, Any] | None = None,
    top_k: int | None = None,
    rows_per_shard: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """The same samples in another profile, with the first `top_k` logits of each token.

    What is None stays as it is in `store`; of another profile no options are kept. Where profile,
    options and K stay, not a bit of a sample changes.
    """
    refuse_own_source([store], [directory])
    there = store.manifest.spec
    profile = there.profile if profile is None else profile
    if profile_options is None:
        profile_options = there.profile_options if profile == there.profile else {}
    k = there.top_k if top_k is None else top_k
    if k > there.top_k:
        raise StoreError(
            f"{store.directory} holds {there.top_k} logits a token, top_k is {k}; lower it, or "
            "dump again"
        )
    if (profile == Sampled.name) != (there.profile == Sampled.name):
        raise StoreError(
            f"{store.directory} has the profile {there.profile}, which cannot become {profile}: "
            "draws from the whole distribution are made at the dump or not at all"
        )
    spec = replace(
        there,
        top_k=k,
        profile=profile,
        profile_options=profile_options,
        rows_per_shard=there.rows_per_shard if rows_per_shard is None else rows_per_shard,
    )
    if replace(spec, rows_per_shard=there.rows_per_shard) == there:
        with DirectoryLock(directory):
            writer = _open_writer(directory, spec, overwrite)
            encoded = ((one[0].row, one) for one in _encoded(store))
            return _write(writer, encoded, _add_encoded, progress)
    samples = (_cut(store[i], k) for i in range(len(store)))
    return write_samples(samples, directory, spec, overwrite=overwrite, progress=progress)


def merge(
    stores: Sequence[Store],
    directory: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """One store with the samples of several, in their order.

    Rows are numbered on: a store's row r becomes `r + offset`, the offset being where the rows of
    those before it end. `spec.source` keeps each store's own source and its offset.
    """
    refuse_own_source(stores, [directory])
    first = stores[0]
    for other in stores[1:]:
        _refuse_unlike(first, other)
    ends = [int(store.rows[-1]) + 1 if len(store) else 0 for store in stores]
    offsets = [0, *accumulate(ends)][:-1]
    parts = [
        {"offset": offset, "store": store.fingerprint, "source": store.manifest.spec.source}
        for store, offset in zip(stores, offsets, strict=True)
    ]
    spec = replace(first.manifest.spec, source={"merged": parts})
    rows = (
        (tokens.row + offset, (tokens, arrays))
        for store, offset in zip(stores, offsets, strict=True)
        for tokens, arrays in _encoded(store)
    )
    with DirectoryLock(directory):
        writer = _open_writer(directory, spec, overwrite)
        return _write(writer, rows, _add_encoded, progress)


def split(
    store: Store,
    directories: Sequence[str | Path],
    weights: Sequence[float],
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Manifest]:
    """Parts of a store, a sample in one of them with the chance that its weight gives.

    Which one follows from the seed and the row number alone, so two stores of the same rows are
    split alike. Rows keep their numbers.
    """
    if len(weights) != len(directories) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise StoreError(
            f"{len(directories)} directories need as many weights, none below 0 and one above: "
            f"{list(weights)}"
        )
    refuse_own_source([store], directories)
    bounds = [end / sum(weights) for end in accumulate(weights)]
    manifests = []
    for part, directory in enumerate(directories):
        note = {"part": part, "weights": list(weights), "seed": seed, "store": store.fingerprint}
        source = {**store.manifest.spec.source, "split": note}
        rows = (
            (tokens.row, (tokens, arrays))
            for tokens, arrays in _encoded(store)
            if _part(seed, tokens.row, bounds) == part
        )
        spec = replace(store.manifest.spec, source=source)
        with DirectoryLock(directory):
            writer = _open_writer(directory, spec, overwrite)
            manifests.append(_write(writer, rows, _add_encoded, progress))
    return manifests


def refuse_own_source(stores: Sequence[Store], directories: Sequence[str | Path]) -> None:
    """Refuse to write a store over one that is read for it, or two stores to one place."""
    sources = {store.directory.resolve() for store in stores}
    targets = [Path(directory).resolve() for directory in directories]
    for place, target in enumerate(targets):
        if target in sources:
            raise StoreError(
                f"{target} is read and would be written over; give another directory as the target"
            )
        if target in targets[:place]:
            raise StoreError(f"{target} is given twice; each part needs a directory of its own")


def _open_writer(directory: str | Path, spec: StoreSpec, overwrite: bool) -> StoreWriter:
    """A writer of a store that is not there yet, or not whole."""
    if (Path(directory) / MANIFEST).exists() and not overwrite:
        raise StoreError(
            f"{directory} holds a whole store already; use overwrite=True (nemo-kd: --overwrite) "
            "to replace it, or choose another directory"
        )
    return StoreWriter(directory, spec, overwrite=overwrite)


def _write(
    writer: StoreWriter,
    rows: Iterable[tuple[int, Item]],
    add: Callable[[ShardWriter, int, Item], None],
    progress: Progress | None,
) -> Manifest:
    """Every (row, item) into the shard of its row; shards that no row needs are empty."""
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
    return writer.finish(shard_index)


def _add_sample(shard: ShardWriter, row: int, sample: Sample) -> None:
    shard.add(sample)


def _add_encoded(shard: ShardWriter, row: int, encoded: Encoded) -> None:
    tokens, arrays = encoded
    shard.add_encoded(replace(tokens, row=row), arrays)


def _encoded(store: Store) -> Iterator[Encoded]:
    for number, info in enumerate(store.manifest.shards):
        for index in range(info.samples):
            yield store.shard(number).encoded(index)


def _cut(sample: Sample, top_k: int) -> Sample:
    topk = sample.topk
    cut = replace(topk, ids=topk.ids[:, :top_k], logits=topk.logits[:, :top_k])
    return replace(sample, topk=cut)


def _refuse_unlike(first: Store, other: Store) -> None:
    found = first.manifest.spec.differences(other.manifest.spec)
    unlike = [d for d in found if not {d[0], d[0].split(".")[0]} & {*MAY_DIFFER}]
    if unlike:
        lines = "\n".join(f"  {name}: {a!r} and {b!r}" for name, a, b in unlike)
        raise StoreError(
            f"{first.directory} and {other.directory} cannot be one store, they differ in\n{lines}"
        )


def _part(seed: int, row: int, bounds: Sequence[float]) -> int:
    (share,) = unit(counter(seed * 0xD1342543DE82EF95 + row * GOLDEN))
    return next(i for i, bound in enumerate(bounds) if share < bound)
