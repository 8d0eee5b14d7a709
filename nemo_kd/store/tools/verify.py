"""Check every checksum and rule of a store; report problems by file, row and position.

This also works for stores that cannot be opened: it never raises because of a file's content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, read_json, sha256_of, size_of
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
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Tokens
from nemo_kd.store.segments import INDEX_BYTES, read_index
from nemo_kd.store.shard import Shard


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
    store: Store | str | Path, on_shard: Callable[[int, int], None] | None = None
) -> Iterator[Problem]:
    """Yield the problems of a store, given open or as a directory; nothing for an intact store.

    `on_shard(done, total)` is called before each shard.
    """
    root = store.directory if isinstance(store, Store) else Path(store)
    try:
        manifest = Manifest.read(root)
        codec = codec_of(manifest.spec)
    except StoreError as error:
        yield Problem(MANIFEST, str(error))
        return
    yield from _verify_head(root, manifest)
    if isinstance(store, Store) and sha256_of(root / MANIFEST) != store.fingerprint:
        yield Problem(MANIFEST, "differs from the manifest that this store was opened with")
    last_row, size = -1, manifest.rows_per_segment or manifest.spec.rows_per_shard
    for number, info in enumerate(manifest.parts):
        if on_shard is not None:
            on_shard(number, len(manifest.parts))
        yield from _verify_entry(root, info, manifest.spec_fingerprint)
        yield from _verify_files(root, info, codec)
        if _readable(root, info, codec):
            rows = range(number * size, (number + 1) * size)
            yield from _verify_samples(root, info, codec, rows, last_row)
        last_row = last_row if info.last_row is None else info.last_row
    yield from _verify_index(root, manifest, codec)


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


def _verify_samples(
    root: Path, info: ShardInfo, codec: Codec, rows: range, last_row: int
) -> Iterator[Problem]:
    """Check each sample of a shard, the order of rows, and the counts in the manifest."""
    try:
        shard = Shard(root, info, codec)
    except StoreError as error:
        yield Problem(info.name, str(error))
        return
    found: list[tuple[int, int, int]] = []  # row, tokens, answer tokens
    for index in range(info.samples):
        try:
            tokens, arrays = shard.unchecked(index)
        except StoreError as error:
            yield Problem(info.name, str(error))
            continue
        for damage in shard.damage(index, tokens, arrays):
            yield Problem(info.name, damage, tokens.row)
        if tokens.row not in rows or tokens.row <= last_row:
            what = f"out of order, or not one of rows {rows.start} to {rows.stop - 1}"
            yield Problem(f"{info.name}/rows.bin", what, tokens.row)
        last_row = tokens.row
        found.append((tokens.row, tokens.input_ids.size, tokens.answers))
        yield from _verify_sample(info.name, tokens, arrays, codec)
    if len(found) == info.samples and _counts(found) != _listed(info):
        what = f"{_counts(found)} found, {MANIFEST} lists {_listed(info)}"
        yield Problem(info.name, f"samples, tokens, answers, without, first, last row: {what}")


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


Counts = tuple[int, int, int, int, int | None, int | None]


def _counts(found: list[tuple[int, int, int]]) -> Counts:
    rows = [row for row, _, _ in found]
    tokens, answers = sum(t for _, t, _ in found), sum(a for _, _, a in found)
    without = sum(a == 0 for _, _, a in found)
    ends = (rows[0], rows[-1]) if rows else (None, None)
    return (len(found), tokens, answers, without, *ends)


def _listed(info: ShardInfo) -> Counts:
    return (
        info.samples,
        info.tokens,
        info.answer_tokens,
        info.samples_without_answer,
        info.first_row,
        info.last_row,
    )
