"""Resume a store after its source file has changed: shards whose rows are the same are kept.

A shard's bytes follow from the spec and its rows. Where the rows' tokens and masks are unchanged,
only the spec's fingerprint in `shard.json` has to be rewritten: the store then equals the one that
a dump from the beginning would write.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import numpy as np

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, publish, read_json
from nemo_kd.store.manifest import MANIFEST, SHARD, SPEC, SPEC_KEY, shard_name
from nemo_kd.store.sample import Tokens
from nemo_kd.store.shard import Shard
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.writer import StoreWriter, shard_directories

MAY_DIFFER = {"source.sha256", "source.rows"}


class EarlierStore:
    """A store of the spec `earlier` in `directory`, to become one of `spec`.

    One process calls `begin`, then any process calls `keep`, for different shards, then one calls
    `finish`. After a kill in between, the same calls can be made again.
    """

    def __init__(self, directory: Path, earlier: StoreSpec, spec: StoreSpec) -> None:
        self.directory, self.spec = directory, spec
        self._writer = StoreWriter(directory, earlier)

    @classmethod
    def find(cls, directory: str | Path, spec: StoreSpec) -> EarlierStore | None:
        """The store in `directory` if its spec differs in the bytes of its source file only."""
        path = Path(directory) / SPEC
        if not path.exists():
            return None
        earlier = StoreSpec.from_json(read_json(path))
        names = {name for name, _, _ in earlier.differences(spec)}
        if not names or names - MAY_DIFFER:
            return None
        return cls(Path(directory), earlier, spec)

    @property
    def shards(self) -> list[int]:
        """The numbers of the complete shards."""
        numbers = (_number(path) for path in shard_directories(self.directory))
        return sorted(number for number in numbers if self._writer.is_complete(number))

    def begin(self) -> None:
        """Mark the store as unfinished."""
        (self.directory / MANIFEST).unlink(missing_ok=True)

    def keep(self, number: int, rows: Iterable[Tokens]) -> bool:
        """Move a complete shard to the new spec if it holds exactly these rows; whether it does."""
        if not self._holds(number, rows):
            return False
        path = self.directory / shard_name(number) / SHARD
        publish(path, canonical_json({**read_json(path), SPEC_KEY: self.spec.fingerprint}))
        return True

    def finish(self, num_shards: int) -> None:
        """Remove the shards beyond the source's new end and write the new spec."""
        for path in shard_directories(self.directory):
            if _number(path) >= num_shards:
                shutil.rmtree(path)
        publish(self.directory / SPEC, canonical_json(self.spec.to_json()))

    def _holds(self, number: int, rows: Iterable[Tokens]) -> bool:
        info = self._writer.complete_shard(number)
        if info is None:
            return False
        try:
            shard = Shard(self.directory, info, self._writer.codec)
            stored = (shard.encoded(index)[0] for index in range(info.samples))
            return all(_same(a, b) for a, b in zip_longest(stored, rows))
        except StoreError:  # damaged: it is written again
            return False


def _number(path: Path) -> int:
    return int(path.name.removeprefix("shard-"))


def _same(stored: Tokens | None, row: Tokens | None) -> bool:
    return (
        stored is not None
        and row is not None
        and stored.row == row.row
        and np.array_equal(stored.input_ids, row.input_ids)
        and np.array_equal(stored.loss_mask, row.loss_mask)
    )
