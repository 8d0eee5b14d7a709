"""Memory-mapped random access to a store; its parts are opened when they are first read."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.files import sha256_of, size_of
from nemo_kd.store.cache import Origin
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.layout import file_names
from nemo_kd.store.manifest import INDEX, MANIFEST, Manifest, ShardInfo, refuse_unfinished
from nemo_kd.store.open_parts import OPEN_PARTS
from nemo_kd.store.replaced import RESTART, Replacement
from nemo_kd.store.sample import Sample
from nemo_kd.store.segments import INDEX_BYTES, read_index
from nemo_kd.store.shard import Encoded, Shard
from nemo_kd.store.spec import StoreSpec


class Store:
    """Sequence of a store's samples: `store[i]` is the i-th sample in row order.

    `directory` may be a URL: the parts of a remote store are fetched to a local cache when they are
    first read (`nemo_kd.store.cache`).

    A store consists of parts: segments, or shards if an earlier version wrote it. Opening reads the
    manifest only. A part is opened, and the sizes of its files are compared with the manifest, when
    it is first read, and a sample's checksums are verified when it is first read; `check_files`
    compares the sizes of all files, `verify` checks everything. If the store is rewritten while it
    is open, opening the next part or unpickling raises StoreError.
    """

    def __init__(self, directory: str | Path) -> None:
        self.origin = Origin(directory)
        self.directory = self.origin.directory
        refuse_unfinished(self.directory)
        self.manifest = Manifest.read(self.directory)
        # Hash the file itself; `verify` checks that it is the canonical JSON of its values.
        self.fingerprint = sha256_of(self.directory / MANIFEST)
        self.codec = codec_of(self.spec)
        self._ends = list(accumulate(part.samples for part in self.manifest.parts))
        self._replacement = Replacement(self.directory, self.manifest)
        self._number = OPEN_PARTS.new_store()
        weakref.finalize(self, OPEN_PARTS.close, self._number)
        self._rows_and_lengths: tuple[NDArray[np.int64], NDArray[np.int32]] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        part, place = self._at(index)
        return part.sample(place)

    def encoded(self, index: int) -> Encoded:
        """Return a sample's tokens and the profile's arrays, without decoding them."""
        part, place = self._at(index)
        return part.encoded(place)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.origin.path, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        try:
            Store.__init__(self, state["path"])
        except StoreError as error:
            raise StoreError(f"cannot open a store again: {error}") from error
        self.fingerprint = state["fingerprint"]
        self._refuse_other_manifest()

    @property
    def spec(self) -> StoreSpec:
        """The settings that determine the store's bytes."""
        return self.manifest.spec

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of each sample [samples], read-only."""
        return self._index()[1]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Source row number of each sample [samples], ascending, read-only."""
        return self._index()[0]

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
                f"temperature={temperature} was not dumped: {self.origin} has "
                f"{list(spec.temperatures)}; train at one of them, or dump again with "
                f"dump.temperatures={[*spec.temperatures, temperature]}"
            )
        own_fingerprint = spec.tokenizer.get("fingerprint")
        for name, expected, found in (
            ("tokenizer", tokenizer_fingerprint, own_fingerprint),
            ("vocabulary size", vocab_size, spec.vocab_size),
        ):
            if expected is not None and expected != found:
                raise StoreError(
                    f"{self.origin}: {name} is {found!r} in the store, expected {expected!r}; "
                    "dump again with the student's tokenizer"
                )

    def index_of(self, row: int) -> int:
        """Return the index of a source row's sample; raise StoreError if the row is not stored."""
        rows = self.rows
        index = int(np.searchsorted(rows, row))
        if index < len(rows) and rows[index] == row:
            return index
        last = f"its last row is {rows[-1]}" if len(rows) else "the store has no samples"
        raise StoreError(f"{self.origin} has no sample for row {row}; {last}")

    def check_files(self) -> None:
        """Raise StoreError if names or sizes of the files differ from the manifest.

        Looks at every file. In a job, one process calls this and tells the others.
        """
        if self.manifest.index is not None:
            self._check_size(self.directory / INDEX, self.manifest.index.bytes)
            self.check_index()
        for info in self.manifest.parts:
            if not self.origin.lacks(info):
                self._check_part(info)

    def check_index(self) -> None:
        """Raise StoreError unless `index.bin` has the SHA-256 in the manifest."""
        index, path = self.manifest.index, self.directory / INDEX
        if index is not None and sha256_of(path) != index.sha256:
            raise StoreError(
                f"{path} is damaged: its SHA-256 differs from that in {MANIFEST}; copy it again, "
                "or run the dump again"
            )

    def _at(self, index: int) -> tuple[Shard, int]:
        """Return the part that holds a sample, and the sample's index in it."""
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.origin}")
        number = bisect_right(self._ends, i)
        return self.part(number), i - self._first(number)

    def _first(self, number: int) -> int:
        """Return the index of a part's first sample."""
        return self._ends[number - 1] if number else 0

    def _index(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return rows and lengths of all samples."""
        if self._rows_and_lengths is None:
            self._rows_and_lengths = self._of_index() if self.manifest.index else self._of_parts()
        return self._rows_and_lengths

    def _of_index(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        samples, path = len(self), self.directory / INDEX
        self._refuse_other_manifest()
        self._check_size(path, samples * INDEX_BYTES)
        index = read_index(path, samples)
        self._refuse_other_manifest()
        return index

    def _refuse_other_manifest(self) -> None:
        path = self.directory / MANIFEST
        if not path.is_file():
            raise StoreError(f"{path} is gone: the store was removed or is rewritten; {RESTART}")
        now = sha256_of(path)
        if now != self.fingerprint:
            raise StoreError(
                f"{self.directory} was replaced after it was opened: the manifest's fingerprint "
                f"was {self.fingerprint[:12]}, now it is {now[:12]}; {RESTART}"
            )

    def _of_parts(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        parts = [self.part(i) for i, info in enumerate(self.manifest.parts) if info.samples]
        rows = np.concatenate([np.zeros(0, np.int64), *(part.rows() for part in parts)])
        lengths = np.concatenate([np.zeros(0, np.int32), *(part.lengths() for part in parts)])
        rows.setflags(write=False)
        lengths.setflags(write=False)
        return rows, lengths

    def part(self, number: int) -> Shard:
        """Return an open part; closes the least recently used ones if too many files are open."""
        # Not while OPEN_PARTS is locked: other threads fetch, and one that collects a store waits.
        self.origin.fetch(self.manifest, number)
        return OPEN_PARTS.get((self._number, number), lambda: self._opened(number))

    def _opened(self, number: int) -> Shard:
        """Open a part and check that it is the one in the manifest.

        The check follows the opening of the files, so that a concurrent replacement is detected.
        """
        info = self.manifest.parts[number]
        try:
            self._check_part(info)
            part = Shard(self.directory, info, self.codec)
        except (OSError, StoreError):
            manifest = self.directory / MANIFEST
            if not manifest.is_file() or sha256_of(manifest) != self.fingerprint:
                self._replacement.refuse(info)
            raise
        self._replacement.refuse(info)
        return part

    def _check_part(self, info: ShardInfo) -> None:
        """Raise StoreError if names or sizes of the part's files differ from the manifest."""
        expected = file_names(self.codec)
        if sorted(info.files) != expected:
            raise StoreError(
                f"{self.directory / MANIFEST}: {info.name} has the files {sorted(info.files)}, "
                f"but the {self.codec.name} profile has {expected}"
            )
        for name, file in info.files.items():
            self._check_size(self.directory / info.name / name, file.bytes)

    def _check_size(self, path: Path, octets: int) -> None:
        size = size_of(path)
        if size != octets:
            found = "is missing" if size is None else f"has {size} bytes"
            if self.origin.url is not None:
                raise StoreError(
                    f"{path} {found}, the manifest lists {octets} bytes; remove {path.parent}: it "
                    f"is a cache of {self.origin}, and is fetched again"
                )
            remove = "" if path.parent == self.directory else f"remove {path.parent} and "
            raise StoreError(
                f"{path} {found}, but the manifest lists {octets} bytes; copy it again, or {remove}"
                "run the dump again, which writes only what is missing"
            )
