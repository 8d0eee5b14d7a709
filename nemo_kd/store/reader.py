"""Memory-mapped random access to a store; a limited number of shards is open at a time."""

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
    """Sequence of a store's samples: `store[i]` is the i-th sample in row order.

    Opening reads the manifest and compares every file's size with it. A sample's checksums are
    verified when it is first read; `verify` checks everything. If the store is rewritten while it
    is open, opening the next shard or unpickling raises StoreError.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        refuse_unfinished(self.directory)
        self.manifest = Manifest.read(self.directory)
        # Hash the file itself; `verify` checks that it is the canonical JSON of its values.
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
        """The settings that determine the store's bytes."""
        return self.manifest.spec

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of each sample [samples]; reads only the index files."""
        parts = [self.shard(number).lengths() for number in self._filled_shards()]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @property
    def rows(self) -> NDArray[np.int64]:
        """Source row number of each sample [samples]."""
        parts = [self.shard(number).rows() for number in self._filled_shards()]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def check(
        self,
        *,
        tokenizer_fingerprint: str | None = None,
        vocab_size: int | None = None,
        temperature: float | None = None,
    ) -> None:
        """Raise StoreError if the store does not match the student; None skips a comparison."""
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
        """Return the index of a source row's sample; raise StoreError if the row is not stored."""
        number = row // self.spec.rows_per_shard
        if 0 <= number < len(self.manifest.shards) and self.manifest.shards[number].samples:
            found = np.flatnonzero(self.shard(number).rows() == row)
            if found.size:
                return self._first(number) + int(found[0])
        last = self.manifest.shards[-1].last_row if self.manifest.shards else None
        raise StoreError(f"{self.directory} has no sample for row {row}; its last row is {last}")

    def _first(self, number: int) -> int:
        """Return the index of a shard's first sample."""
        return self._ends[number - 1] if number else 0

    def _filled_shards(self) -> list[int]:
        return [i for i, shard in enumerate(self.manifest.shards) if shard.samples]

    def shard(self, number: int) -> Shard:
        """Return an open shard; closes the least recently used one if too many are open."""
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

        The check follows the opening of the files, so that a concurrent replacement is detected.
        """
        try:
            shard = Shard(self.directory, info, self.codec)
        except (OSError, StoreError):
            self._replacement.refuse(info)
            raise
        self._replacement.refuse(info)
        return shard

    def _refuse_other_files(self) -> None:
        """Raise StoreError if names or sizes of the files differ from the manifest.

        Uses strings because creating a Path per file would take half of the time.
        """
        expected = file_names(self.codec)
        for shard in self.manifest.shards:
            if sorted(shard.files) != expected:
                raise StoreError(
                    f"{self.directory / MANIFEST}: {shard.name} has the files "
                    f"{sorted(shard.files)}, but the {self.codec.name} profile has {expected}"
                )
            directory = f"{self.directory}/{shard.name}"
            for name, info in shard.files.items():
                size = size_of(f"{directory}/{name}")
                if size != info.bytes:
                    found = "is missing" if size is None else f"has {size} bytes"
                    raise StoreError(
                        f"{directory}/{name} {found}, but the manifest lists {info.bytes}; copy it "
                        f"again, or remove {directory} and run the dump again, which writes only "
                        "that shard"
                    )
