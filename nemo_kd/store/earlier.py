"""A store that was begun when its source file had other bytes: shards of equal rows are kept.

A shard's bytes follow from the spec and its rows. Where the rows' tokens and masks are as they
were, only the spec's fingerprint in `shard.json` is another, and the shard is stamped anew: the
store is then the one that a dump from the beginning would write.
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
    """What is in `directory` of the spec `earlier`, to become part of a store of `spec`.

    One process calls `begin`, then any call `keep`, for different shards, then one calls `finish`.
    Killed in between, the same can be done again.
    """

    def __init__(self, directory: Path, earlier: StoreSpec, spec: StoreSpec) -> None:
        self.directory, self.spec = directory, spec
        self._writer = StoreWriter(directory, earlier)

    @classmethod
    def find(cls, directory: str | Path, spec: StoreSpec) -> EarlierStore | None:
        """The store there, where it is of the same spec but for the bytes of its source."""
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
        """The whole ones."""
        numbers = (_number(path) for path in shard_directories(self.directory))
        return sorted(number for number in numbers if self._writer.is_whole(number))

    def begin(self) -> None:
        """From now on the store is unfinished."""
        (self.directory / MANIFEST).unlink(missing_ok=True)

    def keep(self, number: int, rows: Iterable[Tokens]) -> bool:
        """Stamp a whole shard anew if it is of exactly these rows; whether it is."""
        if not self._is_of(number, rows):
            return False
        path = self.directory / shard_name(number) / SHARD
        publish(path, canonical_json({**read_json(path), SPEC_KEY: self.spec.fingerprint}))
        return True

    def finish(self, num_shards: int) -> None:
        """Remove what is beyond the source's end now; the directory is of the new spec."""
        for path in shard_directories(self.directory):
            if _number(path) >= num_shards:
                shutil.rmtree(path)
        publish(self.directory / SPEC, canonical_json(self.spec.to_json()))

    def _is_of(self, number: int, rows: Iterable[Tokens]) -> bool:
        info = self._writer.whole_shard(number)
        if info is None:
            return False
        try:
            shard = Shard(self.directory, info, self._writer.codec)
            stored = (shard.encoded(index)[0] for index in range(info.samples))
            return all(_same(a, b) for a, b in zip_longest(stored, rows))
        except StoreError:  # damaged: it is written anew
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
