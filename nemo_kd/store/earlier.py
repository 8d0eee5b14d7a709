"""Resume a store after its source file has changed, keeping shards whose rows are unchanged.

A shard's bytes are determined by the spec and its rows. If the tokens and masks of its rows are
unchanged, only the spec's fingerprint in `shard.json` needs to be rewritten; the resulting store is
identical to one dumped from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import numpy as np

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, publish, read_json
from nemo_kd.store.manifest import (
    EXCHANGE,
    INDEX,
    MANIFEST,
    PACKING,
    SHARD,
    SPEC,
    SPEC_KEY,
    segment_name,
    shard_name,
)
from nemo_kd.store.ours import remove_part
from nemo_kd.store.parts import part_number, segment_directories, shard_directories
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Tokens
from nemo_kd.store.segments import Packing, Segments
from nemo_kd.store.shard import Shard
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.writer import StoreWriter

MAY_DIFFER = {"source.sha256", "source.rows", "source.files"}
COMPARED = 256
"""Samples of a finished store that are looked for in the changed source."""


class EarlierStore:
    """Conversion of the store in `directory` from the spec `earlier` to `spec`.

    One process calls `unpack` and `begin`, then any processes call `keep` for different shards,
    then one process calls `finish`. If the job is killed in between, the calls can be repeated.
    """

    def __init__(self, directory: Path, earlier: StoreSpec, spec: StoreSpec) -> None:
        self.directory, self.spec = directory, spec
        self._writer = StoreWriter(directory, earlier)

    def unpack(self) -> None:
        """Write the samples of the segments to shards again, and remove the segments."""
        packing = Packing.read(self.directory)
        if packing is None:
            return
        packing.write(self.directory)
        (self.directory / MANIFEST).unlink(missing_ok=True)
        size = self.spec.rows_per_shard
        for number in range(-(-packing.rows // size)):
            if self._writer.complete_shard(number) is None:
                with suppress(StoreError):  # rows of damaged or missing segments are dumped again
                    self._unpack(number, range(number * size, (number + 1) * size), packing)
        publish(self.directory / SPEC, canonical_json(self._writer.spec.resumable_json()))
        for path in segment_directories(self.directory):
            remove_part(path)
        for name in (INDEX, PACKING):
            (self.directory / name).unlink(missing_ok=True)

    def _unpack(self, number: int, rows: range, packing: Packing) -> None:
        segments = Segments(self.directory, self._writer.spec, self._writer.codec, packing)
        with self._writer.shard(number) as out:
            for segment in packing.segments_of(rows):
                info = segments.complete(segment)
                if info is None:
                    raise StoreError(f"{segment_name(segment)} is incomplete")
                part = Shard(self.directory, info, self._writer.codec)
                start, stop = np.searchsorted(part.rows(), [rows.start, rows.stop])
                for index in range(start, stop):
                    out.add_encoded(*part.encoded(index))

    @classmethod
    def find(cls, directory: str | Path, spec: StoreSpec) -> EarlierStore | None:
        """Return the store in `directory` if its spec differs only in the source file's content.

        Returns None if there is no store, if the specs are equal, or if they differ elsewhere.
        """
        path = Path(directory) / SPEC
        if not path.exists():
            return None
        earlier = StoreSpec.from_json(read_json(path), rows_per_shard=spec.rows_per_shard)
        names = {name for name, _, _ in earlier.differences(spec)}
        if not names or names - MAY_DIFFER or earlier.rows_per_shard != spec.rows_per_shard:
            return None
        return cls(Path(directory), earlier, spec)

    @property
    def finished(self) -> bool:
        return (self.directory / MANIFEST).exists()

    @property
    def shards(self) -> list[int]:
        """The indices of the complete shards, ascending."""
        numbers = (part_number(path) for path in shard_directories(self.directory))
        return sorted(number for number in numbers if self._writer.is_complete(number))

    def has_rows_of(
        self, num_rows: int, tokens_of: Callable[[Sequence[int]], Iterable[Tokens]]
    ) -> bool:
        """Whether any of up to `COMPARED` samples of a finished store is still in the source.

        Also if the store is damaged, so that this cannot be said: it is written again then.
        """
        try:
            store = Store(self.directory)
            index = np.linspace(0, len(store) - 1, min(COMPARED, len(store))).astype(int)
            samples = [store.encoded(int(i))[0] for i in index]
        except StoreError:
            return True
        rows = [one.row for one in samples if one.row < num_rows]
        found = {row.row: row for row in tokens_of(rows)}
        return any(_same(one, found.get(one.row)) for one in samples)

    def begin(self) -> None:
        """Mark the store as unfinished by removing its manifest, and its content as JSONL."""
        for name in (MANIFEST, EXCHANGE):
            (self.directory / name).unlink(missing_ok=True)

    def keep(self, number: int, rows: Iterable[Tokens]) -> bool:
        """Assign a complete shard to the new spec if it holds exactly these rows.

        Returns whether the shard was kept.
        """
        if not self._holds(number, rows):
            return False
        path = self.directory / shard_name(number) / SHARD
        publish(path, canonical_json({**read_json(path), SPEC_KEY: self.spec.fingerprint}))
        return True

    def finish(self, num_shards: int) -> None:
        """Remove the shards past the end of the new source and write the new spec."""
        for path in shard_directories(self.directory):
            if part_number(path) >= num_shards:
                remove_part(path)
        publish(self.directory / SPEC, canonical_json(self.spec.resumable_json()))

    def _holds(self, number: int, rows: Iterable[Tokens]) -> bool:
        info = self._writer.complete_shard(number)
        if info is None:
            return False
        try:
            shard = Shard(self.directory, info, self._writer.codec)
            stored = (shard.encoded(index)[0] for index in range(info.samples))
            return all(_same(a, b) for a, b in zip_longest(stored, rows))
        except StoreError:  # damaged shards are written again
            return False


def _same(stored: Tokens | None, row: Tokens | None) -> bool:
    return (
        stored is not None
        and row is not None
        and stored.row == row.row
        and np.array_equal(stored.input_ids, row.input_ids)
        and np.array_equal(stored.loss_mask, row.loss_mask)
    )
