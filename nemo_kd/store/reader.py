"""Reading a store: memory-mapped, any sample at any time, nothing kept but the open shards."""

from __future__ import annotations

import os
import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store.codecs import codec_of
from nemo_kd.store.errors import StoreError
from nemo_kd.store.indexed import FieldReader
from nemo_kd.store.layout import (
    ROW_ITEM,
    field_dtypes,
    file_names,
    teacher_checksum,
    token_checksum,
)
from nemo_kd.store.manifest import MANIFEST, SHARD, SPEC, Manifest, ShardInfo
from nemo_kd.store.sample import Sample

# megatron-core holds three file descriptors for each .bin/.idx pair.
_DESCRIPTORS_PER_FIELD = 3


class Store:
    """`store[i]` is the i-th sample by row number; `len(store)` counts them.

    Opening reads the manifest and compares every file's size with it. A sample's own checksums
    are compared whenever it is read; `verify` compares everything.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        _refuse_unfinished(self.directory)
        self.manifest = Manifest.read(self.directory)
        self.fingerprint = self.manifest.fingerprint
        self._codec = codec_of(self.manifest.spec)
        self._ends = list(accumulate(shard.samples for shard in self.manifest.shards))
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptors = _DESCRIPTORS_PER_FIELD * len(field_dtypes(self._codec))
        self._most_open = max(1, soft_limit // (2 * descriptors))
        for shard in self.manifest.shards:
            self._refuse_other_sizes(shard)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.directory}")
        number = bisect_right(self._ends, place)
        first = self._ends[number - 1] if number else 0
        return self._shard(number).sample(place - first)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Store.__init__(self, state["directory"])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[samples]: the tokens of each sample, from the indices alone."""
        parts = [self._shard(number).lengths for number in self._filled_shards()]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @property
    def rows(self) -> NDArray[np.int64]:
        """[samples]: the row number of each sample."""
        parts = [self._shard(number).rows for number in self._filled_shards()]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def check(
        self,
        *,
        tokenizer_fingerprint: str | None = None,
        vocab_size: int | None = None,
        temperature: float | None = None,
        template: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Refuse a store that was not made for this student; what is None is not compared.

        `template` is compared key by key, those that are given. `fingerprint` is the store's own,
        as a checkpoint remembers it.
        """
        spec = self.manifest.spec
        if temperature is not None and temperature not in spec.temperatures:
            raise StoreError(
                f"model.kd.temperature={temperature} was not dumped: {self.directory} has "
                f"{list(spec.temperatures)}; set model.kd.temperature to one of them, or dump "
                f"again with model.kd.temperatures={[*spec.temperatures, temperature]}"
            )
        again = "dump again with the student's"
        compared = [
            (
                "tokenizer",
                tokenizer_fingerprint,
                spec.tokenizer.get("fingerprint"),
                f"{again} tokenizer",
            ),
            ("vocabulary size", vocab_size, spec.vocab_size, f"{again} tokenizer"),
            ("fingerprint", fingerprint, self.fingerprint, "resume on the store that was trained"),
        ]
        for key, value in (template or {}).items():
            hint = f"set it to {spec.template.get(key)!r}, or dump again with {value!r}"
            compared.append((f"template setting {key}", value, spec.template.get(key), hint))
        for name, expected, there, hint in compared:
            if expected is not None and expected != there:
                raise StoreError(
                    f"{self.directory}: {name} is {there!r} in the store, {expected!r} here; {hint}"
                )

    def _filled_shards(self) -> list[int]:
        return [i for i, shard in enumerate(self.manifest.shards) if shard.samples]

    def _shard(self, number: int) -> _Shard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= self._most_open:
            self._open.popitem(last=False)
        shard = _Shard(self, self.manifest.shards[number])
        self._open[number] = shard
        return shard

    def _refuse_other_sizes(self, shard: ShardInfo) -> None:
        if sorted(shard.files) != file_names(self._codec):
            raise StoreError(
                f"{self.directory / MANIFEST}: {shard.name} has the files {sorted(shard.files)}, "
                f"the {self._codec.name} profile has {file_names(self._codec)}"
            )
        for name, info in shard.files.items():
            path = self.directory / shard.name / name
            size = os.path.getsize(path) if path.is_file() else None
            if size != info.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise StoreError(
                    f"{path} {found}, the manifest says {info.bytes}; copy it again, or remove "
                    f"{path.parent} and run the dump again, which writes only that shard"
                )


class _Shard:
    """The open files of one shard."""

    def __init__(self, store: Store, info: ShardInfo) -> None:
        self._directory = store.directory / info.name
        self._codec = store._codec
        self._fields = {
            name: FieldReader(self._directory / name, dtype, info.samples)
            for name, dtype in field_dtypes(self._codec).items()
        }
        self._tokens, self._mask = self._fields["tokens"], self._fields["loss_mask"]
        self._rows = self._fields["rows"]
        self._teacher = [(name, self._fields[name]) for name in self._codec.dtypes]
        self._samples = info.samples

    @property
    def lengths(self) -> NDArray[np.int32]:
        return self._tokens.lengths.copy()

    @property
    def rows(self) -> NDArray[np.int64]:
        items = self._rows.values
        if items.size != ROW_ITEM * self._samples:
            raise StoreError(f"{self._rows.prefix}.bin: not {ROW_ITEM} values a sample")
        return items.reshape(-1, ROW_ITEM)[:, 0].copy()

    def sample(self, index: int) -> Sample:
        input_ids, loss_mask = self._tokens[index], self._mask[index]
        arrays = {name: field[index] for name, field in self._teacher}
        item = self._rows[index].tolist()
        sums = [token_checksum(input_ids, loss_mask), teacher_checksum(arrays.values())]
        if item[1:] != sums:
            raise self._damaged(index, item, "its checksum is not the one that was written")
        try:
            teacher = self._codec.decode(arrays, int(np.count_nonzero(loss_mask[1:])))
        except ValueError as error:
            raise self._damaged(index, item, str(error)) from error
        return Sample(item[0], input_ids.copy(), loss_mask.copy(), *teacher)

    def _damaged(self, index: int, item: list[int], why: str) -> StoreError:
        row = f" (row {item[0]})" if len(item) == ROW_ITEM else ""
        return StoreError(
            f"{self._directory}: sample {index}{row} is damaged: {why}; `nemo-kd verify "
            f"{self._directory.parent}` lists the damage, a dump writes removed shards again"
        )


def _refuse_unfinished(directory: Path) -> None:
    if (directory / MANIFEST).is_file():
        return
    if not directory.is_dir():
        raise StoreError(f"no store at {directory}: there is no such directory")
    whole = len(list(directory.glob(f"shard-*/{SHARD}")))
    if whole or (directory / SPEC).exists():
        raise StoreError(
            f"{directory}: the dump has not finished ({whole} whole shards, no {MANIFEST}); run "
            "the same dump command again, it goes on where it was"
        )
    raise StoreError(f"no store at {directory}: it has neither {MANIFEST} nor shards")
