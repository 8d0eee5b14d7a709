"""Join the shards of a finished dump to segments: a few large parts instead of many small ones.

Segment s holds the source rows [s R, (s + 1) R). R follows from the total size and the last row
alone, so the segments' bytes do not depend on the shards, the processes that wrote them or resumes.
A shard is removed once all of its rows are in complete segments; joining therefore needs little
disk space, and can be interrupted and repeated.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, commit, full_disk_explained, publish, read_json, size_of
from nemo_kd.store.codecs import Codec
from nemo_kd.store.codecs.sampled import EARLIER_FIELDS
from nemo_kd.store.indexed import FieldWriter, mapped
from nemo_kd.store.layout import field_dtypes, file_names
from nemo_kd.store.manifest import (
    MANIFEST,
    PACKING,
    SHARD,
    FileInfo,
    Manifest,
    ShardInfo,
    read_shard_info,
    segment_name,
    shard_json,
)
from nemo_kd.store.ours import remove_part
from nemo_kd.store.parts import check_hashes
from nemo_kd.store.shard import Shard
from nemo_kd.store.spec import StoreSpec

MOST_ROWS = 1 << 62  # rows of a segment; a manifest holds them as an int64
INDEX_BYTES = 8 + 4  # per sample in `index.bin`
SMALLEST, LARGEST, SEGMENTS = 1 << 30, 16 << 30, 64
"""Segments have 1 GiB; a larger store has up to 64 segments, of at most 16 GiB each."""


def target_bytes(octets: float) -> float:
    """Return the default size of the segments of a store whose `.bin` files have `octets`."""
    return min(max(octets / SEGMENTS, SMALLEST), LARGEST)


def last_row(parts: Iterable[ShardInfo]) -> int:
    """Return the last source row of parts; -1 if they have no sample."""
    return max((part.last_row for part in parts if part.last_row is not None), default=-1)


def complete_part(directory: Path, codec: Codec, fingerprints: Sequence[str]) -> ShardInfo | None:
    """Return the entry of a shard or segment; None unless all its files have their full size.

    `fingerprints`: those of the specs of which it may be. Raises StoreError for draws in an earlier
    encoding, which would be lost if the part counted as incomplete.
    """
    if not (directory / SHARD).exists():
        return None
    try:
        part, spec = read_shard_info(directory)
    except StoreError:
        return None
    if spec in fingerprints and {f"{name}.bin" for name in EARLIER_FIELDS} <= set(part.files):
        raise StoreError(
            f"{directory} has draws in the encoding of format version 2; finish the dump with the "
            f"nemo-kd that began it, or remove {directory.parent} to start over"
        )
    if spec not in fingerprints or sorted(part.files) != file_names(codec):
        return None
    sizes = {name: size_of(directory / name) for name in part.files}
    return part if sizes == {name: info.bytes for name, info in part.files.items()} else None


def publish_part(temporary: Path, target: Path, info: ShardInfo, spec: StoreSpec) -> None:
    """Describe the files in `temporary`, which are complete, and rename it to `target`."""
    (temporary / SHARD).write_text(shard_json(info, spec.fingerprint), encoding="utf-8")
    if target.exists():
        remove_part(target)  # incomplete: complete parts are not written again
    commit(temporary, target)


@dataclass(frozen=True)
class Packing:
    """The plan of a store's segments."""

    rows_per_segment: int
    rows: int
    """One more than the last row that has a sample."""
    samples: int
    """Number of samples."""

    @property
    def count(self) -> int:
        """Number of segments."""
        return -(-self.rows // self.rows_per_segment)

    def segments_of(self, rows: range) -> range:
        """Return the numbers of the segments that hold any of `rows`."""
        stop = min(rows.stop, self.rows)
        if rows.start >= stop:
            return range(0)
        return range(rows.start // self.rows_per_segment, (stop - 1) // self.rows_per_segment + 1)

    def rows_of(self, number: int) -> range:
        """Return the source rows of a segment."""
        start = number * self.rows_per_segment
        return range(start, min(start + self.rows_per_segment, self.rows))

    @classmethod
    def of(cls, shards: Sequence[ShardInfo], segment_bytes: int | None = None) -> Packing:
        """Plan segments of about `segment_bytes`, counted without the indices."""
        octets = sum(
            info.bytes
            for shard in shards
            for name, info in shard.files.items()
            if name.endswith(".bin")
        )
        rows = 1 + last_row(shards)
        target = segment_bytes or int(target_bytes(octets))
        each = min(max(1, -(-rows * target // max(octets, 1))), MOST_ROWS)
        return cls(each, rows, sum(shard.samples for shard in shards))

    @classmethod
    def read(cls, directory: Path) -> Packing | None:
        """Return the plan of a store that is being joined or is finished; None if it has none."""
        if (directory / MANIFEST).exists():
            manifest = Manifest.read(directory)
            if manifest.rows_per_segment is None:
                return None
            rows = 1 + last_row(manifest.parts)
            return cls(manifest.rows_per_segment, rows, manifest.totals["samples"])
        path = directory / PACKING
        if not path.exists():
            return None
        value = read_json(path)
        names = {field.name for field in fields(cls)}
        numbers = isinstance(value, dict) and all(type(n) is int and n >= 0 for n in value.values())
        if not numbers or set(value) != names or not value["rows_per_segment"]:
            raise StoreError(f"{path} is not a plan of segments: remove it, and run the dump again")
        return cls(**value)

    def write(self, directory: Path) -> None:
        """Write the plan, after which the segments may be joined."""
        publish(directory / PACKING, canonical_json(vars(self)))


class Segments:
    """The segments of a store that is being written, joined by any number of processes."""

    def __init__(self, directory: Path, spec: StoreSpec, codec: Codec, packing: Packing) -> None:
        self.directory, self.packing = directory, packing
        self._spec, self._codec = spec, codec
        self._complete: dict[int, ShardInfo] = {}

    def complete(self, number: int) -> ShardInfo | None:
        """Return the entry of a segment if all its files have their full size, else None."""
        if number not in self._complete:
            directory = self.directory / segment_name(number)
            info = complete_part(directory, self._codec, [self._spec.fingerprint])
            if info is None:
                return None
            self._complete[number] = info
        return self._complete[number]

    def hold(self, rows: range) -> bool:
        """Return whether complete segments hold all samples of these rows."""
        return all(self.complete(number) for number in self.packing.segments_of(rows))

    def join(self, number: int, shards: Sequence[ShardInfo]) -> None:
        """Write a segment from the shards that hold its rows."""
        rows = self.packing.rows_of(number)
        name = segment_name(number)
        temporary = self.directory / f".{name}.tmp"
        with full_disk_explained(self.directory):
            if temporary.exists():
                remove_part(temporary)  # left by a process that was killed
            temporary.mkdir()
            try:
                info = self._joined(temporary, name, rows, shards)
                publish_part(temporary, self.directory / name, info, self._spec)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def _joined(
        self, temporary: Path, name: str, rows: range, shards: Sequence[ShardInfo]
    ) -> ShardInfo:
        fields = {
            field: FieldWriter(temporary / field, dtype)
            for field, dtype in field_dtypes(self._codec).items()
        }
        counts = np.zeros(4, np.int64)  # samples, tokens, answer tokens, samples without answer
        first: int | None = None
        last: int | None = None
        try:
            for info in shards:
                check_hashes(self.directory / info.name, info)
                shard = Shard(self.directory, info, self._codec)
                own = shard.rows()
                start, stop = np.searchsorted(own, [rows.start, rows.stop])
                if start == stop:
                    continue
                for field, (values, lengths) in shard.stretch(start, stop).items():
                    fields[field].extend(values, lengths)
                counts += _counts(shard, start, stop)
                first, last = int(own[start]) if first is None else first, int(own[stop - 1])
        finally:
            files = {k: v for field in fields.values() for k, v in _closed(field).items()}
        samples, tokens, answers, without = map(int, counts)
        return ShardInfo(name, samples, tokens, answers, without, first, last, files)


def write_index(path: Path, parts: Iterator[Shard], samples: int) -> None:
    """Write `index.bin`: the source row (int64) and the length (int32) of every sample."""
    lengths = np.zeros(samples, "<i4")
    done = 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part.rows().astype("<i8", copy=False).tobytes())
            own = part.lengths()
            lengths[done : done + own.size] = own
            done += own.size
        file.write(lengths.tobytes())


def read_index(path: Path, samples: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Map `index.bin` of this number of samples; return rows and lengths [samples], read-only."""
    octets = mapped(path)
    return octets[: 8 * samples].view("<i8"), octets[8 * samples :].view("<i4")


def _counts(shard: Shard, start: int, stop: int) -> NDArray[np.int64]:
    """Return samples, tokens, answer tokens and samples without an answer of a stretch."""
    mask, lengths = shard.stretch(start, stop)["loss_mask"]
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    ones = np.add.reduceat(mask != 0, starts, dtype=np.int64) - (mask[starts] != 0)
    return np.array([stop - start, ends[-1], ones.sum(), (ones == 0).sum()], np.int64)


def _closed(field: FieldWriter) -> dict[str, FileInfo]:
    return {name: FileInfo(*info) for name, info in field.close().items()}
