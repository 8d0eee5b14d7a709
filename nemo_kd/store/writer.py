"""Write a store: any process may write any shard, in any order; the manifest is written last.

A shard is a directory that is written under a temporary name and renamed once all its files are on
disk, so it is either complete or absent. Its bytes depend only on the spec and its rows: the store
is the same for any number of processes and for a dump that was killed and resumed.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nemo_kd.errors import StoreError
from nemo_kd.files import (
    canonical_json,
    commit,
    full_disk_explained,
    publish,
    read_json,
    sha256_of,
    size_of,
)
from nemo_kd.store.checks import checked_tokens, checked_topk
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.codecs.base import Arrays
from nemo_kd.store.indexed import FieldWriter
from nemo_kd.store.layout import field_dtypes, file_names, seal, token_checksum, word_sums
from nemo_kd.store.manifest import (
    EXCHANGE,
    MANIFEST,
    SHARD,
    SPEC,
    SPEC_KEY,
    FileInfo,
    Manifest,
    ShardInfo,
    read_shard_info,
    shard_name,
)
from nemo_kd.store.sample import Sample, Tokens
from nemo_kd.store.spec import StoreSpec


class StoreWriter:
    """A store being written; every process of a dump opens it with the same spec.

    With `overwrite` an existing store is removed first. Only one process may do this; the others
    then open the store without `overwrite`. The caller excludes other jobs with a `DirectoryLock`,
    held by one process of the job.
    """

    def __init__(self, directory: str | Path, spec: StoreSpec, overwrite: bool = False) -> None:
        self.directory = Path(directory)
        self.spec = spec
        self.codec = codec_of(spec)
        with full_disk_explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _remove_store(self.directory)
        if (self.directory / SPEC).exists():
            self._refuse_other_spec()
        else:
            publish(self.directory / SPEC, canonical_json(spec.to_json()))

    def is_complete(self, shard_index: int) -> bool:
        """Return whether the shard exists and has this spec, with every file at its full size."""
        return self.complete_shard(shard_index) is not None

    def shard(self, shard_index: int) -> ShardWriter:
        """Return a context manager that writes one shard; at most one process may write a shard."""
        return ShardWriter(self, shard_index)

    def finish(self, num_shards: int) -> Manifest:
        """Write the manifest; one process calls this once every shard has been written."""
        found = [self.complete_shard(index) for index in range(num_shards)]
        missing = [str(index) for index, shard in enumerate(found) if shard is None]
        if missing:
            raise StoreError(
                f"{self.directory}: shards {', '.join(missing[:20])} of {num_shards} are missing "
                "or incomplete; run the same dump command again, which writes only those"
            )
        beyond = [path.name for path in shard_directories(self.directory)][num_shards:]
        if beyond:
            raise StoreError(
                f"{self.directory}: {', '.join(beyond)} beyond the {num_shards} shards of this "
                "source belong to another dump; use overwrite=true to start over"
            )
        _remove_leftovers(self.directory)
        manifest = Manifest(self.spec, tuple(shard for shard in found if shard is not None))
        manifest.write(self.directory)
        return manifest

    def _refuse_other_spec(self) -> None:
        existing = StoreSpec.from_json(read_json(self.directory / SPEC))
        differences = existing.differences(self.spec)
        if differences:
            lines = "\n".join(
                f"  {name}: {old!r} in the store, {new!r} now" for name, old, new in differences
            )
            raise StoreError(
                f"{self.directory} holds a store of another configuration:\n{lines}\n"
                "use overwrite=true to drop it and start over, or choose another directory"
            )

    def complete_shard(self, shard_index: int) -> ShardInfo | None:
        """Return the shard's entry if `is_complete`, else None."""
        directory = self.directory / shard_name(shard_index)
        if not (directory / SHARD).exists():
            return None
        try:
            shard, spec = read_shard_info(directory)
        except StoreError:
            return None
        if spec != self.spec.fingerprint or sorted(shard.files) != file_names(self.codec):
            return None
        sizes = {name: size_of(directory / name) for name in shard.files}
        complete = sizes == {name: info.bytes for name, info in shard.files.items()}
        return shard if complete else None


class ShardWriter:
    """Context manager that writes one shard, row by row, and publishes it on a clean exit."""

    def __init__(self, store: StoreWriter, shard_index: int) -> None:
        rows = store.spec.rows_per_shard
        self._store = store
        self._name = shard_name(shard_index)
        self._rows = range(shard_index * rows, (shard_index + 1) * rows)
        self._directory = store.directory / f".{self._name}.tmp"
        self._fields: dict[str, FieldWriter] = {}
        self._first_row: int | None = None
        self._last_row: int | None = None
        self._samples = self._tokens = self._answer_tokens = self._without_answer = 0

    def __enter__(self) -> ShardWriter:
        if self._directory.exists():
            shutil.rmtree(self._directory)  # left by a dump that was killed
        with full_disk_explained(self._store.directory):
            self._directory.mkdir()
            for name, dtype in field_dtypes(self._store.codec).items():
                self._fields[name] = FieldWriter(self._directory / name, dtype)
        return self

    def add(self, sample: Sample) -> None:
        """Append one sample; raise StoreError, naming the row, if it does not match the spec.

        Samples must be added in ascending row order.
        """
        row, spec = int(sample.row), self._store.spec
        try:
            input_ids, loss_mask, answers = checked_tokens(
                sample.input_ids, sample.loss_mask, spec.vocab_size
            )
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
        for field in self._fields.values():
            field.close()
        (self._directory / SHARD).write_text(canonical_json(self._description()), encoding="utf-8")
        target = self._store.directory / self._name
        if target.exists():
            shutil.rmtree(target)  # incomplete: complete shards are not written again
        commit(self._directory, target)

    def _description(self) -> dict[str, Any]:
        names = file_names(self._store.codec)
        files = {name: self._directory / name for name in names}
        info = ShardInfo(
            name=self._name,
            samples=self._samples,
            tokens=self._tokens,
            answer_tokens=self._answer_tokens,
            samples_without_answer=self._without_answer,
            first_row=self._first_row,
            last_row=self._last_row,
            files={n: FileInfo(p.stat().st_size, sha256_of(p)) for n, p in files.items()},
        )
        return {**info.to_json(), SPEC_KEY: self._store.spec.fingerprint}


def shard_directories(directory: Path) -> list[Path]:
    """Return the shard directories in order, including incomplete ones."""
    found = [path for path in directory.glob("shard-*[0-9]") if path.is_dir()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _remove_store(directory: Path) -> None:
    """Remove a store, its manifest first, so that an interruption leaves an unfinished store."""
    (directory / MANIFEST).unlink(missing_ok=True)
    (directory / SPEC).unlink(missing_ok=True)
    (directory / EXCHANGE).unlink(missing_ok=True)
    for path in shard_directories(directory):
        shutil.rmtree(path)
    _remove_leftovers(directory)


def _remove_leftovers(directory: Path) -> None:
    """Remove temporary files and directories left by killed processes."""
    for path in directory.glob(".shard-*.tmp"):
        shutil.rmtree(path)
    for pattern in (".*.json.*.tmp", ".*.jsonl.*.tmp", f"shard-*/.{SHARD}.*.tmp"):
        for path in directory.glob(pattern):
            path.unlink()
