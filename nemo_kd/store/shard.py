"""The open files of one shard, memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs import Codec
from nemo_kd.store.indexed import FieldReader
from nemo_kd.store.layout import (
    ROW_ITEM,
    field_dtypes,
    seal,
    token_checksum,
    unseal,
    word_sums,
)
from nemo_kd.store.manifest import ShardInfo
from nemo_kd.store.sample import Sample


class Stored(NamedTuple):
    """A sample as it lies in the files: read-only views into them."""

    row: int
    checksum: int
    sealed: int
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    arrays: dict[str, NDArray[Any]]

    @property
    def answers(self) -> int:
        return int(np.count_nonzero(self.loss_mask[1:]))


class Shard:
    """Samples by their place in the shard."""

    def __init__(self, store_directory: Path, info: ShardInfo, codec: Codec) -> None:
        self.info = info
        self.directory = store_directory / info.name
        self._codec = codec
        self._fields = {
            name: FieldReader(self.directory / name, dtype, info.samples)
            for name, dtype in field_dtypes(codec).items()
        }
        self._tokens, self._mask = self._fields["tokens"], self._fields["loss_mask"]
        self._rows = self._fields["rows"]
        self._teacher = [(name, self._fields[name]) for name in codec.dtypes]
        self._checked = bytearray(info.samples)

    def lengths(self) -> NDArray[np.int32]:
        """[samples]: their tokens."""
        return self._tokens.lengths.copy()

    def rows(self) -> NDArray[np.int64]:
        """[samples]: their row numbers."""
        items = self._rows.values
        if items.size != ROW_ITEM * self.info.samples:
            raise StoreError(f"{self._rows.prefix}.bin: not {ROW_ITEM} values a sample")
        return items.reshape(-1, ROW_ITEM)[:, 0].copy()

    def sample(self, index: int) -> Sample:
        stored = self.stored(index)
        try:
            teacher = self._codec.decode(stored.arrays, stored.answers)
        except ValueError as error:
            raise self._refusal(index, stored, str(error)) from error
        return Sample(stored.row, stored.input_ids.copy(), stored.loss_mask.copy(), *teacher)

    def stored(self, index: int) -> Stored:
        """The sample's arrays; StoreError where they are not those of its checksums.

        Compared when a sample is first read: the files do not change under an open store.
        """
        stored = self.unchecked(index)
        if not self._checked[index]:
            for damage in self.damage(stored):
                raise self._refusal(index, stored, damage)
            self._checked[index] = True
        return stored

    def unchecked(self, index: int) -> Stored:
        """The sample's arrays as they are; StoreError where an index points outside its file."""
        item = self._rows[index]
        if item.size != ROW_ITEM:
            raise StoreError(f"{self._rows.prefix}.idx: sample {index} has {item.size} values")
        row, checksum, sealed = item.tolist()
        arrays = {name: field[index] for name, field in self._teacher}
        return Stored(row, checksum, sealed, self._tokens[index], self._mask[index], arrays)

    def damage(self, stored: Stored) -> list[str]:
        """What differs from the sample's checksums; nothing when all is well."""
        found = []
        if token_checksum(stored.input_ids, stored.loss_mask) != stored.checksum:
            found.append("tokens.bin or loss_mask.bin has another checksum")
        sums = word_sums(stored.arrays.values())
        if seal(stored.row, sums) != stored.sealed:
            then = unseal(stored.row, stored.sealed, len(sums))
            pairs = zip(stored.arrays, sums, then, strict=True)
            fields = [f"{name}.bin" for name, a, b in pairs if a != b] or ["rows.bin"]
            found.append(f"{' or '.join(fields)} has another checksum")
        return found

    def _refusal(self, index: int, stored: Stored, why: str) -> StoreError:
        return StoreError(
            f"{self.directory}: sample {index} (row {stored.row}) is damaged: {why}; `nemo-kd "
            "verify` lists the damage, and a dump that finds the shard removed writes it again"
        )
