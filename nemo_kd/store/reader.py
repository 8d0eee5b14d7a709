"""Read a store: memory-mapped, with random access; only open shards are kept in memory."""

from __future__ import annotations

import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.files import sha256_of, size_of
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.indexed import FieldReader
from nemo_kd.store.layout import field_dtypes, file_names
from nemo_kd.store.manifest import MANIFEST, Manifest, ShardInfo, refuse_unfinished
from nemo_kd.store.replaced import RESTART, Replacement
from nemo_kd.store.sample import Sample
from nemo_kd.store.shard import Shard
from nemo_kd.store.spec import StoreSpec


class Store:
    """`store[i]` is the i-th sample by row number; `len(store)` counts them.

    Opening reads the manifest and compares every file's size with it. A sample's checksums are
    compared when it is first read; `verify` compares everything. A store that is rewritten while
    it is open is refused when the next shard is opened, and when it is unpickled.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        refuse_unfinished(self.directory)
        self.manifest = Manifest.read(self.directory)
        # `verify` finds a manifest that is not the canonical JSON of its values.
        self.fingerprint = sha256_of(self.directory / MANIFEST)
        self.codec = codec_of(self.spec)
        self._ends = list(accumulate(shard.samples for shard in self.manifest.shards))
        self._replacement = Replacement(self.directory, self.manifest)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptors = FieldReader.descriptors * len(field_dtypes(self.codec))
        self._most_open = max(1, soft_limit // (2 * descriptors))
        self._refuse_other_files()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.directory}")
        number = bisect_right(self._ends, i)
        return self.shard(number).sample(i - self._first(number))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        try:
            Store.__init__(self, state["directory"])
        except StoreError as error:
            raise StoreError(f"cannot open a store again: {error}") from error
        if self.fingerprint != state["fingerprint"]:
            raise StoreError(
                f"{self.directory} was replaced after it was opened: the manifest's fingerprint "
                f"was {state['fingerprint'][:12]}, now it is {self.fingerprint[:12]}; "
                f"{RESTART}"
            )

    @property
    def spec(self) -> StoreSpec:
        """What decided the store's bytes."""
        return self.manifest.spec

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[samples]: the number of tokens of each sample; reads only the indices."""
        parts = [self.shard(number).lengths() for number in self._filled_shards()]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @property
    def rows(self) -> NDArray[np.int64]:
        """[samples]: the row number of each sample."""
        parts = [self.shard(number).rows() for number in self._filled_shards()]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def check(
        self,
        *,
        tokenizer_fingerprint: str | None = None,
        vocab_size: int | None = None,
        temperature: float | None = None,
    ) -> None:
        """Refuse a store that does not fit this student; None is not compared."""
        spec = self.spec
        if temperature is not None and temperature not in spec.temperatures:
            raise StoreError(
                f"temperature={temperature} was not dumped: {self.directory} has "
                f"{list(spec.temperatures)}; train at one of them, or dump again with "
                f"temperatures={[*spec.temperatures, temperature]}"
            )
        own_fingerprint = spec.tokenizer.get("fingerprint")
        for name, expected, found in (
            ("tokenizer", tokenizer_fingerprint, own_fingerprint),
            ("vocabulary size", vocab_size, spec.vocab_size),
        ):
            if expected is not None and expected != found:
                raise StoreError(
                    f"{self.directory}: {name} is {found!r} in the store, expected {expected!r}; "
                    "dump again with the student's tokenizer"
                )

    def index_of(self, row: int) -> int:
        """The index of a source row's sample; StoreError if the store does not have it."""
        number = row // self.spec.rows_per_shard
        if 0 <= number < len(self.manifest.shards) and self.manifest.shards[number].samples:
            found = np.flatnonzero(self.shard(number).rows() == row)
            if found.size:
                return self._first(number) + int(found[0])
        last = self.manifest.shards[-1].last_row if self.manifest.shards else None
        raise StoreError(f"{self.directory} has no sample of row {row}; its last row is {last}")

    def _first(self, number: int) -> int:
        """Index of a shard's first sample."""
        return self._ends[number - 1] if number else 0

    def _filled_shards(self) -> list[int]:
        return [i for i, shard in enumerate(self.manifest.shards) if shard.samples]

    def shard(self, number: int) -> Shard:
        """The open files of a shard; the least recently used shard is closed to make room."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= self._most_open:
            self._open.popitem(last=False)
        shard = self._opened(self.manifest.shards[number])
        self._open[number] = shard
        return shard

    def _opened(self, info: ShardInfo) -> Shard:
        """Open a shard and check that it is the one in the manifest.

        Checked once its files are open, so that a replacement in the meantime is noticed.
        """
        try:
            shard = Shard(self.directory, info, self.codec)
        except (OSError, StoreError):
            self._replacement.refuse(info)
            raise
        self._replacement.refuse(info)
        return shard

    def _refuse_other_files(self) -> None:
        """Compare names and sizes; a Path per file would take half of the time."""
        expected = file_names(self.codec)
        for shard in self.manifest.shards:
            if sorted(shard.files) != expected:
                raise StoreError(
                    f"{self.directory / MANIFEST}: {shard.name} has the files "
                    f"{sorted(shard.files)}, the {self.codec.name} profile has {expected}"
                )
            directory = f"{self.directory}/{shard.name}"
            for name, info in shard.files.items():
                size = size_of(f"{directory}/{name}")
                if size != info.bytes:
                    found = "is missing" if size is None else f"has {size} bytes"
                    raise StoreError(
                        f"{directory}/{name} {found}, the manifest lists {info.bytes}; copy it "
                        f"again, or remove {directory} and run the dump again, which writes only "
                        "that shard"
                    )
