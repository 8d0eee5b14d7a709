"""Write a store: any process may write any shard, in any order; then they are joined to segments.

A shard is a directory that is written under a temporary name and renamed once all its files are on
disk, so it is either complete or absent. Its bytes depend only on the spec and its rows: the store
is the same for any number of processes and for a dump that was killed and resumed. The manifest is
written last.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from nemo_kd.errors import StoreError
from nemo_kd.files import (
    canonical_json,
    full_disk_explained,
    publish,
    published,
    read_json,
    sha256_of,
    sha256_of_json,
)
from nemo_kd.store.checks import checked_tokens, checked_topk
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.codecs.base import Arrays
from nemo_kd.store.indexed import FieldWriter
from nemo_kd.store.layout import field_dtypes, seal, token_checksum, word_sums
from nemo_kd.store.manifest import (
    INDEX,
    MANIFEST,
    PACKING,
    SHARD,
    SPEC,
    FileInfo,
    Manifest,
    ShardInfo,
    segment_name,
    shard_name,
)
from nemo_kd.store.ours import refuse_foreign, remove_part
from nemo_kd.store.parts import part_number, segment_directories, shard_directories
from nemo_kd.store.sample import EncodedSample, Sample, Tokens
from nemo_kd.store.segments import (
    INDEX_BYTES,
    Packing,
    Segments,
    complete_part,
    last_row,
    publish_part,
    write_index,
)
from nemo_kd.store.set_aside import make_room, remove_replaced
from nemo_kd.store.shard import Shard
from nemo_kd.store.spec import StoreSpec


class StoreWriter:
    """A store being written; every process of a dump opens it with the same spec.

    With `overwrite` the directory may hold another store, which is kept until this one is complete
    (see `nemo_kd.store.set_aside`); a directory that is neither empty nor a store is refused. Only
    one process may do this; the others then open the store without `overwrite`. The caller excludes
    other jobs with a `DirectoryLock`, held by one process of the job.
    """

    def __init__(self, directory: str | Path, spec: StoreSpec, overwrite: bool = False) -> None:
        self.directory = Path(directory)
        self.spec = spec
        self.codec = codec_of(spec)
        # Of a spec, and of one in a shard of version 1.
        self._fingerprints = [spec.fingerprint, sha256_of_json(spec.resumable_json())]
        with full_disk_explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        if overwrite or not (self.directory / SPEC).exists():
            refuse_foreign(self.directory)
        if overwrite:
            make_room(self.directory, spec)
            _remove_leftovers(self.directory)
        if (self.directory / SPEC).exists():
            self._refuse_other_spec()
        else:
            publish(self.directory / SPEC, canonical_json(spec.resumable_json()))
        packing = Packing.read(self.directory)
        self._joined = (
            None if packing is None else Segments(self.directory, spec, self.codec, packing)
        )

    def is_complete(self, shard_index: int) -> bool:
        """Return whether the rows of a shard are written, in the shard itself or in segments."""
        return self.complete_shard(shard_index) is not None or self._is_joined(shard_index)

    def _is_joined(self, shard_index: int) -> bool:
        rows = self.spec.rows_per_shard
        return self._joined is not None and self._joined.hold(
            range(shard_index * rows, (shard_index + 1) * rows)
        )

    def shard(self, shard_index: int) -> ShardWriter:
        """Return a context manager that writes one shard; at most one process may write a shard."""
        return ShardWriter(self, shard_index)

    def finish(self, num_shards: int, segment_bytes: int | None = None) -> Manifest:
        """Join the shards and write the manifest; one process calls this once all are written."""
        self.begin_joining(num_shards, segment_bytes)
        self.join()
        return self.publish()

    def begin_joining(self, num_shards: int, segment_bytes: int | None = None) -> None:
        """Check that every shard is complete and plan the segments; one process calls this.

        `segment_bytes`: approximate size of a segment; None: see `nemo_kd.store.segments`.
        """
        found = [self.complete_shard(index) for index in range(num_shards)]
        missing = [str(i) for i, info in enumerate(found) if not (info or self._is_joined(i))]
        if missing:
            raise StoreError(
                f"{self.directory}: shards {', '.join(missing[:20])} of {num_shards} are missing "
                "or incomplete; run the same dump command again, which writes only those"
            )
        _remove_leftovers(self.directory)
        if Packing.read(self.directory) is None:
            self._refuse_other_shards(num_shards)
            shards = [info for info in found if info is not None]
            Packing.of(shards, segment_bytes).write(self.directory)
            (self.directory / MANIFEST).unlink(missing_ok=True)  # of version 1
        else:
            self._refuse_other_plan()

    def join(
        self, share: slice = slice(None), on_segment: Callable[[int, int], None] | None = None
    ) -> None:
        """Join the shards to segments, those of `share`; each by one process.

        `on_segment(done, total)` is called after each segment.
        """
        segments, size = self._planned(), self.spec.rows_per_shard
        mine = range(segments.packing.count)[share]
        for done, number in enumerate(mine, start=1):
            rows = segments.packing.rows_of(number)
            numbers = range(rows.start // size, (rows.stop - 1) // size + 1)
            if segments.complete(number) is None:
                segments.join(number, [self._required(shard) for shard in numbers])
            for shard in numbers:
                if segments.hold(range(shard * size, (shard + 1) * size)):
                    with suppress(FileNotFoundError):  # another process may be removing it, too
                        remove_part(self.directory / shard_name(shard))
            if on_segment is not None:
                on_segment(done, len(mine))

    def publish(self) -> Manifest:
        """Write index and manifest, once all segments are joined; one process calls this."""
        segments = self._planned()
        found = [segments.complete(number) for number in range(segments.packing.count)]
        missing = [segment_name(i) for i, info in enumerate(found) if info is None]
        if missing:
            raise StoreError(f"{self.directory}: {', '.join(missing[:20])} are missing")
        parts = tuple(info for info in found if info is not None)
        samples = sum(info.samples for info in parts)
        if samples != segments.packing.samples:
            raise StoreError(
                f"{self.directory}: the segments hold {samples} samples, "
                f"{segments.packing.samples} were planned; remove them and run the dump again"
            )
        with published(self.directory / INDEX) as path:
            write_index(path, (Shard(self.directory, i, self.codec) for i in parts), samples)
        index = FileInfo(samples * INDEX_BYTES, sha256_of(self.directory / INDEX))
        manifest = Manifest(self.spec, parts, segments.packing.rows_per_segment, index)
        manifest.write(self.directory)
        for path in shard_directories(self.directory):
            remove_part(path)
        publish(self.directory / SPEC, canonical_json(self.spec.to_json()))
        (self.directory / PACKING).unlink(missing_ok=True)
        remove_replaced(self.directory)
        return manifest

    def _refuse_other_shards(self, num_shards: int) -> None:
        beyond = [path.name for path in shard_directories(self.directory)][num_shards:]
        if beyond:
            raise StoreError(
                f"{self.directory}: {', '.join(beyond)} beyond the {num_shards} shards of this "
                "source belong to another dump; use overwrite=true to start over"
            )

    def _refuse_other_plan(self) -> None:
        """Raise StoreError if the plan of the segments does not end where the samples end."""
        segments = self._planned()
        numbers = [part_number(path) for path in shard_directories(self.directory)]
        found = [self.complete_shard(number) for number in numbers]
        numbers = [part_number(path) for path in segment_directories(self.directory)]
        found += [segments.complete(number) for number in numbers]
        rows = 1 + last_row(info for info in found if info is not None)
        if rows != segments.packing.rows:
            raise StoreError(
                f"{self.directory / PACKING} plans segments of {segments.packing.rows} rows, but "
                f"the last sample is of row {rows - 1}; remove {PACKING} and run the dump again"
            )

    def _required(self, shard_index: int) -> ShardInfo:
        info = self.complete_shard(shard_index)
        if info is None:
            raise StoreError(
                f"{self.directory / shard_name(shard_index)} is missing or incomplete; run the "
                "same command again"
            )
        return info

    def _planned(self) -> Segments:
        packing = Packing.read(self.directory)
        if packing is None:
            raise StoreError(f"{self.directory}: begin_joining has not been called")
        return Segments(self.directory, self.spec, self.codec, packing)

    def _refuse_other_spec(self) -> None:
        size = self.spec.rows_per_shard
        existing = StoreSpec.from_json(read_json(self.directory / SPEC), rows_per_shard=size)
        differences = existing.differences(self.spec)
        if existing.rows_per_shard != size:
            differences.append(("rows_per_shard", existing.rows_per_shard, size))
        if differences:
            lines = "\n".join(
                f"  {name}: {old!r} in the store, {new!r} now" for name, old, new in differences
            )
            raise StoreError(
                f"{self.directory} holds a store of another configuration:\n{lines}\n"
                "use overwrite=true to drop it and start over, or choose another directory"
            )

    def complete_shard(self, shard_index: int) -> ShardInfo | None:
        """Return the entry of a shard that has this spec and files of full size, else None."""
        directory = self.directory / shard_name(shard_index)
        return complete_part(directory, self.codec, self._fingerprints)


class ShardWriter:
    """Context manager that writes one shard, row by row, and publishes it on a clean exit."""

    def __init__(self, store: StoreWriter, shard_index: int) -> None:
        rows = store.spec.rows_per_shard
        self._store, self.spec = store, store.spec
        self._name = shard_name(shard_index)
        self._rows = range(shard_index * rows, (shard_index + 1) * rows)
        self._directory = store.directory / f".{self._name}.tmp"
        self._fields: dict[str, FieldWriter] = {}
        self._first_row: int | None = None
        self._last_row: int | None = None
        self._samples = self._tokens = self._answer_tokens = self._without_answer = 0

    def __enter__(self) -> ShardWriter:
        if self._directory.exists():
            remove_part(self._directory)  # left by a dump that was killed
        with full_disk_explained(self._store.directory):
            self._directory.mkdir()
            for name, dtype in field_dtypes(self._store.codec).items():
                self._fields[name] = FieldWriter(self._directory / name, dtype)
        return self

    def add(self, sample: Sample | EncodedSample) -> None:
        """Append one sample; raise StoreError, naming the row, if it does not match the spec.

        Samples must be added in ascending row order. Of an encoded one only the tokens are checked.
        """
        row, spec = int(sample.row), self._store.spec
        try:
            input_ids, loss_mask, answers = checked_tokens(
                sample.input_ids, sample.loss_mask, spec.vocab_size
            )
            if isinstance(sample, EncodedSample):
                self.add_encoded(Tokens(row, input_ids, loss_mask), sample.arrays)
                return
            arrays = self._store.codec.encode(checked_topk(sample, answers, spec))
        except StoreError as error:
            raise StoreError(f"row {row}: {error}") from error
        self.add_encoded(Tokens(row, input_ids, loss_mask), arrays)

    def add_encoded(self, tokens: Tokens, arrays: Arrays) -> None:
        """Append a sample that is already encoded in the store's profile."""
        row, input_ids, loss_mask = tokens.row, tokens.input_ids, tokens.loss_mask
        self._check_row(row)
        sealed = seal(row, word_sums(arrays[name] for name in self._store.codec.dtypes))
        item = np.array([row, token_checksum(input_ids, loss_mask), sealed], dtype=np.int64)
        own: Arrays = {"tokens": input_ids, "loss_mask": loss_mask, "rows": item}
        for name, array in {**arrays, **own}.items():
            self._fields[name].add(array)
        answers = tokens.answers
        self._first_row = row if self._first_row is None else self._first_row
        self._last_row = row
        self._samples += 1
        self._tokens += input_ids.size
        self._answer_tokens += answers
        self._without_answer += answers == 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with full_disk_explained(self._store.directory):
            try:
                if error is not None:
                    raise error
                self._publish()
            except BaseException:
                self._discard()
                raise

    def _check_row(self, row: int) -> None:
        if row not in self._rows:
            raise StoreError(
                f"row {row} does not belong to {self._name}, which holds rows "
                f"{self._rows.start} to {self._rows.stop - 1} "
                f"(rows_per_shard={self._store.spec.rows_per_shard})"
            )
        if self._last_row is not None and row <= self._last_row:
            raise StoreError(
                f"{self._name}: row {row} after row {self._last_row}; add the rows of a shard in "
                "ascending order, each once"
            )

    def _discard(self) -> None:
        for field in self._fields.values():
            with suppress(OSError):  # closing flushes, and the disk may be full
                field.abandon()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _publish(self) -> None:
        closed = [field.close() for field in self._fields.values()]
        info = ShardInfo(
            name=self._name,
            samples=self._samples,
            tokens=self._tokens,
            answer_tokens=self._answer_tokens,
            samples_without_answer=self._without_answer,
            first_row=self._first_row,
            last_row=self._last_row,
            files={name: FileInfo(*info) for files in closed for name, info in files.items()},
        )
        target = self._store.directory / self._name
        publish_part(self._directory, target, info, self._store.spec)


def _remove_leftovers(directory: Path) -> None:
    """Remove temporary files and directories left by killed processes."""
    for path in (*directory.glob(".shard-*.tmp"), *directory.glob(".segment-*.tmp")):
        remove_part(path)
    for pattern in (
        ".*.json.*.tmp",
        f".{INDEX}.*.tmp",
        ".*.jsonl.*.tmp",
        f"shard-*/.{SHARD}.*.tmp",
    ):
        for path in directory.glob(pattern):
            path.unlink()
