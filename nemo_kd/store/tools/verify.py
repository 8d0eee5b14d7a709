"""Check every checksum and rule of a store; report problems by file, row and position.

This also works for stores that cannot be opened: it never raises because of a file's content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, read_json, sha256_of, size_of
from nemo_kd.store.cache import Origin
from nemo_kd.store.checks import deep_faults, topk_faults
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.codecs.base import Arrays, Codec
from nemo_kd.store.layout import file_names
from nemo_kd.store.manifest import (
    INDEX,
    MANIFEST,
    SHARD,
    SPEC,
    Manifest,
    ShardInfo,
    read_shard_info,
)
from nemo_kd.store.ours import is_part
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Tokens
from nemo_kd.store.segments import INDEX_BYTES, read_index
from nemo_kd.store.shard import Shard
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.batches import STRETCH_BYTES, counts_if_valid, split
from nemo_kd.store.tools.parallel import ordered, processes

TASK_BYTES = 1 << 26
"""Approximate bytes of the samples that one process checks at a time."""
Counts = tuple[int, int, int, int, int | None, int | None]
"""Samples, tokens, answer tokens, samples without an answer, first and last row."""


@dataclass(frozen=True)
class Problem:
    """A defect found in a store."""

    file: str
    """Path relative to the store."""

    what: str

    row: int | None = None
    """Source row."""

    position: int | None = None
    """Index of the token in the row."""

    def __str__(self) -> str:
        where = [self.file]
        where += [f"row {self.row}"] if self.row is not None else []
        where += [f"position {self.position}"] if self.position is not None else []
        return f"{', '.join(where)}: {self.what}"


def verify(
    store: Store | Origin | str | Path,
    on_done: Callable[[int, int], None] | None = None,
    jobs: int = 1,
    checksums_only: bool = False,
) -> Iterator[Problem]:
    """Yield the problems of a store, given open or as a directory; nothing for an intact store.

    `on_done(bytes, total bytes)` is called during the check. `jobs`: number of processes, 0 for one
    per core if the store is large; see `nemo_kd.store.tools.parallel.ordered`. `checksums_only`:
    compare the files' sizes and SHA-256 with the manifest, which finds every change since the store
    was written, and do not read the samples.
    """
    origin = store.origin if isinstance(store, Store) else store
    origin = origin if isinstance(origin, Origin) else Origin(origin)
    root = origin.directory
    try:
        manifest = Manifest.read(root)
        codec = codec_of(manifest.spec)
    except StoreError as error:
        yield Problem(MANIFEST, str(error))
        return
    yield from _verify_head(root, manifest)
    if origin.url is None:  # a cache has files of its own
        yield from _verify_directory(root, manifest)
    if isinstance(store, Store) and sha256_of(root / MANIFEST) != store.fingerprint:
        yield Problem(MANIFEST, "differs from the manifest that this store was opened with")
    passes = 1 if checksums_only else 2  # every byte is hashed, then read
    done, total = 0, max(passes * manifest.totals["bytes"], 1)
    counts: list[Counts] = []
    tasks = (task for task in _tasks(origin, manifest) if not (checksums_only and task.samples))
    for result in ordered(_run, tasks, processes(jobs, total)):
        yield from result.problems
        counts.append(result.counts)
        if result.last:
            yield from _verify_counts(result.last, counts)
            counts = []
        done += result.octets
        if on_done is not None:
            on_done(min(done, total), total)
    yield from _verify_index(root, manifest, codec)


@dataclass(frozen=True)
class _Task:
    """Hash the files of a part, or check its samples [start, stop); for one process."""

    root: Path
    info: ShardInfo
    spec: StoreSpec
    spec_fingerprint: str
    rows: range
    """Source rows that the part may hold."""
    last_row: int
    """Last source row of the parts before this one; -1 if there is none."""
    samples: range | None = None


@dataclass
class _Result:
    octets: int
    problems: list[Problem]
    counts: Counts = (0, 0, 0, 0, None, None)
    last: ShardInfo | None = None
    """The part, after its last samples."""


def _tasks(origin: Origin, manifest: Manifest) -> Iterator[_Task]:
    last_row, size = -1, manifest.rows_per_segment or manifest.spec.rows_per_shard
    fingerprint = manifest.spec_fingerprint
    for number, info in enumerate(manifest.parts):
        rows = range(number * size, (number + 1) * size)
        origin.fetch(manifest, number)
        task = _Task(origin.directory, info, manifest.spec, fingerprint, rows, last_row)
        yield task
        yield from (replace(task, samples=samples) for samples in split(info, TASK_BYTES))
        last_row = last_row if info.last_row is None else info.last_row


def _run(task: _Task) -> _Result:
    codec, info = codec_of(task.spec), task.info
    octets = sum(file.bytes for file in info.files.values())
    if task.samples is None:
        entry = _verify_entry(task.root, info, task.spec_fingerprint)
        return _Result(octets, [*entry, *_verify_files(task.root, info, codec)])
    result = _Result(octets * len(task.samples) // max(info.samples, 1), [])
    if _readable(task.root, info, codec):
        result.problems += _verify_samples(task, codec, result)
    if task.samples.stop == info.samples:
        result.last = info
    return result


def _verify_head(root: Path, manifest: Manifest) -> Iterator[Problem]:
    text = (root / MANIFEST).read_bytes()
    if text != canonical_json(manifest.to_json()).encode():
        yield Problem(
            MANIFEST, "altered since it was written: not the canonical JSON of its values"
        )
    try:
        spec = read_json(root / SPEC)
    except StoreError as error:
        yield Problem(SPEC, str(error))
        return
    if manifest.index is not None and isinstance(spec, dict):
        spec.pop("rows_per_shard", None)  # left by a writer that was killed at its very end
    if spec != manifest.spec_json:
        yield Problem(SPEC, f"differs from the spec in {MANIFEST}")


def _verify_directory(root: Path, manifest: Manifest) -> Iterator[Problem]:
    """Report parts that the manifest does not list, such as those of another store.

    Other files, such as a README, are no problem: nothing reads them.
    """
    listed = {info.name for info in manifest.parts}
    for path in sorted(root.iterdir()):
        if path.name not in listed and is_part(path):
            yield Problem(path.name, f"is not listed in {MANIFEST}; move it away")


def _verify_entry(root: Path, info: ShardInfo, spec: str) -> Iterator[Problem]:
    """Compare a shard's `shard.json` with its entry in the manifest."""
    try:
        if read_shard_info(root / info.name) != (info, spec):
            yield Problem(f"{info.name}/{SHARD}", f"differs from the shard's entry in {MANIFEST}")
    except StoreError as error:
        yield Problem(f"{info.name}/{SHARD}", str(error))


def _verify_files(root: Path, info: ShardInfo, codec: Codec) -> Iterator[Problem]:
    """Compare names, sizes and SHA-256 of a shard's files with the manifest."""
    directory = root / info.name
    expected = file_names(codec)
    if sorted(info.files) != expected:
        yield Problem(MANIFEST, f"{info.name} has the files {sorted(info.files)}")
    for name in expected:  # not the names in the manifest, which may be paths to anywhere
        if name not in info.files:
            continue
        file, size = info.files[name], size_of(directory / name)
        if size != file.bytes:
            found = "missing" if size is None else f"{size} bytes"
            yield Problem(f"{info.name}/{name}", f"{found}, expected {file.bytes} bytes")
        elif sha256_of(directory / name) != file.sha256:
            yield Problem(f"{info.name}/{name}", f"its SHA-256 differs from that in {MANIFEST}")
    present = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    for name in sorted(present - {*expected, SHARD}):
        yield Problem(f"{info.name}/{name}", "does not belong to a shard")


def _verify_index(root: Path, manifest: Manifest, codec: Codec) -> Iterator[Problem]:
    """Compare the index of the store with its entry in the manifest, and with the parts."""
    if manifest.index is None:
        return
    size = size_of(root / INDEX)
    if size != manifest.index.bytes:
        found = "missing" if size is None else f"{size} bytes"
        yield Problem(INDEX, f"{found}, expected {manifest.index.bytes} bytes")
        return
    if sha256_of(root / INDEX) != manifest.index.sha256:
        yield Problem(INDEX, f"its SHA-256 differs from that in {MANIFEST}")
    samples, start = manifest.totals["samples"], 0
    if size != samples * INDEX_BYTES:
        yield Problem(INDEX, f"{size} bytes for {samples} samples")
        return
    rows, lengths = read_index(root / INDEX, samples)
    for info in manifest.parts:
        own = slice(start, start := start + info.samples)
        if not _readable(root, info, codec):
            continue
        with suppress(StoreError):  # a damaged part has been reported
            part = Shard(root, info, codec)
            if not (
                np.array_equal(rows[own], part.rows())
                and np.array_equal(lengths[own], part.lengths())
            ):
                yield Problem(INDEX, f"differs from the rows or lengths of {info.name}")


def _readable(root: Path, info: ShardInfo, codec: Codec) -> bool:
    """Return whether all files have their listed sizes; otherwise no sample can be read."""
    sizes = {name: size_of(root / info.name / name) for name in file_names(codec)}
    return sizes == {name: file.bytes for name, file in info.files.items()}


def _verify_samples(task: _Task, codec: Codec, result: _Result) -> Iterator[Problem]:
    """Check samples of a part and the order of their rows; count them in `result`."""
    info, samples = task.info, task.samples or range(0)
    try:
        part = Shard(task.root, info, codec)
        last_row = int(part.rows()[samples.start - 1]) if samples.start else task.last_row
    except StoreError as error:
        if not samples.start:
            yield Problem(info.name, str(error))
        return
    found: list[NDArray[np.int64]] = []  # rows, tokens, answer tokens [3, samples]
    for stretch in split(info, STRETCH_BYTES, samples):
        valid = counts_if_valid(part, codec, stretch, task.rows, last_row)
        if valid is None:
            valid = np.zeros((3, 0), np.int64)
            for index in stretch:
                try:
                    tokens, arrays = part.unchecked(index)
                except StoreError as error:
                    yield Problem(info.name, str(error))
                    continue
                yield from _verify_one(task, part, index, tokens, arrays, last_row, codec)
                last_row = tokens.row
                counts = [[tokens.row], [tokens.input_ids.size], [tokens.answers]]
                valid = np.concatenate([valid, np.array(counts, np.int64)], axis=1)
        found.append(valid)
        last_row = int(valid[0, -1]) if valid.size else last_row
    result.counts = _counts(np.concatenate([np.zeros((3, 0), np.int64), *found], axis=1))


def _verify_one(
    task: _Task,
    part: Shard,
    index: int,
    tokens: Tokens,
    arrays: Arrays,
    last_row: int,
    codec: Codec,
) -> Iterator[Problem]:
    """Check one sample and that its row comes after `last_row`."""
    name, rows = task.info.name, task.rows
    for damage in part.damage(index, tokens, arrays):
        yield Problem(name, damage, tokens.row)
    if tokens.row not in rows or tokens.row <= last_row:
        what = f"out of order, or not one of rows {rows.start} to {rows.stop - 1}"
        yield Problem(f"{name}/rows.bin", what, tokens.row)
    yield from _verify_sample(name, tokens, arrays, codec)


def _verify_sample(shard: str, tokens: Tokens, arrays: Arrays, codec: Codec) -> Iterator[Problem]:
    """Check the tokens, mask and top-K of one sample."""
    ids, mask, row = tokens.input_ids, tokens.loss_mask, tokens.row
    outside = (ids < 0) | (ids >= codec.spec.vocab_size)
    if not ids.size or ids.size != mask.size or (mask > 1).any():
        what = f"{ids.size} tokens, {mask.size} values of the mask, which must be 0 or 1"
        yield Problem(f"{shard}/loss_mask.bin", what, row)
        return
    if outside.any():
        position = int(outside.argmax())
        what = f"token {ids[position]} outside [0, {codec.spec.vocab_size})"
        yield Problem(f"{shard}/tokens.bin", what, row, position)
    fields = ", ".join(f"{name}.bin" for name in codec.dtypes)
    try:
        with np.errstate(all="ignore"):  # damaged values may be arbitrary numbers
            topk = codec.decode(arrays, tokens.answers)
            faults = [*topk_faults(topk, codec.spec), *deep_faults(topk, codec.spec)]
    except ValueError as error:
        yield Problem(f"{shard}/{fields}", str(error), row)
        return
    positions = np.flatnonzero(mask[1:]) + 1
    for fault in faults:
        what = f"column {fault.column}: {fault.what}"
        yield Problem(f"{shard}/{fields}", what, row, int(positions[fault.token]))


def _verify_counts(info: ShardInfo, parts: list[Counts]) -> Iterator[Problem]:
    """Compare the counts of a part's samples with the manifest, if all could be read."""
    samples, tokens, answers, without = (sum(part[i] or 0 for part in parts) for i in range(4))
    ends = [row for part in parts for row in part[4:] if row is not None]
    found = (samples, tokens, answers, without, *((ends[0], ends[-1]) if ends else (None, None)))
    if samples == info.samples and found != _listed(info):
        what = f"{found} found, {MANIFEST} lists {_listed(info)}"
        yield Problem(info.name, f"samples, tokens, answers, without, first, last row: {what}")


def _counts(found: NDArray[np.int64]) -> Counts:
    rows, tokens, answers = found
    ends = (int(rows[0]), int(rows[-1])) if rows.size else (None, None)
    return (rows.size, int(tokens.sum()), int(answers.sum()), int((answers == 0).sum()), *ends)


def _listed(info: ShardInfo) -> Counts:
    return (
        info.samples,
        info.tokens,
        info.answer_tokens,
        info.samples_without_answer,
        info.first_row,
        info.last_row,
    )
