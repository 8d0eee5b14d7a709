"""Memory-mapped access to the files of one shard, or of a segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs.base import Arrays, Codec
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
from nemo_kd.store.sample import Sample, Tokens

Encoded = tuple[Tokens, Arrays]
"""A sample in encoded form: read-only views of its tokens and of the profile's arrays."""


class Shard:
    """Random access to the samples of a shard, by index."""

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
        self.descriptors = FieldReader.descriptors * len(self._fields)
        """Number of file descriptors that are open."""

    def lengths(self) -> NDArray[np.int32]:
        """Return the number of tokens of each sample [samples]."""
        return self._tokens.lengths.copy()

    def rows(self) -> NDArray[np.int64]:
        """Return the source row number of each sample [samples]."""
        items = self._rows.values
        if items.size != ROW_ITEM * self.info.samples:
            raise StoreError(f"{self._rows.prefix}.bin: not {ROW_ITEM} values per sample")
        return items.reshape(-1, ROW_ITEM)[:, 0].copy()

    def stretch(self, start: int, stop: int) -> dict[str, tuple[NDArray[Any], NDArray[np.int32]]]:
        """Return the values and lengths of each field of the samples [start, stop), not checked."""
        return {name: field.stretch(start, stop) for name, field in self._fields.items()}

    def sample(self, index: int) -> Sample:
        """Return the decoded sample; raise StoreError if it is damaged."""
        tokens, arrays = self.encoded(index)
        try:
            topk = self._codec.decode(arrays, tokens.answers)
        except ValueError as error:
            raise self._refusal(index, tokens.row, str(error)) from error
        return Sample(tokens.row, tokens.input_ids.copy(), tokens.loss_mask.copy(), topk)

    def encoded(self, index: int) -> Encoded:
        """Return the sample's encoded arrays; raise StoreError if they fail its checksums.

        Checked only when a sample is first read, since the files of an open shard do not change.
        """
        tokens, arrays = self.unchecked(index)
        if not self._checked[index]:
            for damage in self.damage(index, tokens, arrays):
                raise self._refusal(index, tokens.row, damage)
            self._checked[index] = True
        return tokens, arrays

    def unchecked(self, index: int) -> Encoded:
        """Return the sample's encoded arrays without verifying checksums.

        Raises StoreError if an index points outside its file.
        """
        item = self._rows[index]
        if item.size != ROW_ITEM:
            raise StoreError(f"{self._rows.prefix}.idx: sample {index} has {item.size} values")
        tokens = Tokens(item.item(0), self._tokens[index], self._mask[index])
        return tokens, {name: field[index] for name, field in self._teacher}

    def damage(self, index: int, tokens: Tokens, arrays: Arrays) -> list[str]:
        """Describe the files that do not match the sample's checksums; empty if all match."""
        row, checksum, sealed = self._rows[index].tolist()
        found = []
        if token_checksum(tokens.input_ids, tokens.loss_mask) != checksum:
            found.append("tokens.bin or loss_mask.bin has another checksum")
        sums = word_sums(arrays.values())
        if seal(row, sums) != sealed:
            expected = unseal(row, sealed, len(sums))
            pairs = zip(arrays, sums, expected, strict=True)
            fields = [f"{name}.bin" for name, a, b in pairs if a != b] or ["rows.bin"]
            found.append(f"{' or '.join(fields)} has another checksum")
        return found

    def _refusal(self, index: int, row: int, why: str) -> StoreError:
        return StoreError(
            f"{self.directory}: sample {index} (row {row}) is damaged: {why}; `nemo-kd verify` "
            "lists the damage; remove the shard and run the dump again to write it anew"
        )
