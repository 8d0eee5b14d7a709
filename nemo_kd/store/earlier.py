"""Resume a store after its source file has changed, keeping shards whose rows are unchanged.

A shard's bytes are determined by the spec and its rows. If the tokens and masks of its rows are
unchanged, only the spec's fingerprint in `shard.json` needs to be rewritten; the resulting store is
identical to one dumped from scratch.
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
    """Conversion of the store in `directory` from the spec `earlier` to `spec`.

    One process calls `begin`, then any processes call `keep` for different shards, then one process
    calls `finish`. If the job is killed in between, the same calls can be repeated.
    """

    def __init__(self, directory: Path, earlier: StoreSpec, spec: StoreSpec) -> None:
        self.directory, self.spec = directory, spec
        self._writer = StoreWriter(directory, earlier)

    @classmethod
    def find(cls, directory: str | Path, spec: StoreSpec) -> EarlierStore | None:
        """Return the store in `directory` if its spec differs only in the source file's content.

        Returns None if there is no store, if the specs are equal, or if they differ elsewhere.
        """
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
        """The indices of the complete shards, ascending."""
        numbers = (_number(path) for path in shard_directories(self.directory))
        return sorted(number for number in numbers if self._writer.is_complete(number))

    def begin(self) -> None:
        """Mark the store as unfinished by removing its manifest."""
        (self.directory / MANIFEST).unlink(missing_ok=True)

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
        except StoreError:  # damaged shards are written again
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
