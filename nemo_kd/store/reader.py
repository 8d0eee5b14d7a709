"""Reading a store: memory-mapped, any sample at any time, nothing kept but the open shards."""

from __future__ import annotations

import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
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
from nemo_kd.store.manifest import MANIFEST, SHARD, SPEC, Manifest, ShardInfo
from nemo_kd.store.replaced import START_AGAIN, Replacement
from nemo_kd.store.sample import Sample
from nemo_kd.store.shard import Shard
from nemo_kd.store.verify import Problem, verify


class Store:
    """`store[i]` is the i-th sample by row number; `len(store)` counts them.

    Opening reads the manifest and compares every file's size with it. A sample's own checksums
    are compared when it is first read; `verify` compares everything. A store that is written anew
    while it is open is refused at the next shard that is opened, and when it is unpickled.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        refuse_unfinished(self.directory)
        self.manifest = Manifest.read(self.directory)
        # The manifest's file is its canonical JSON, or it is not the one that was written.
        self.fingerprint = sha256_of(self.directory / MANIFEST)
        self.codec = codec_of(self.manifest.spec)
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
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.directory}")
        number = bisect_right(self._ends, place)
        first = self._ends[number - 1] if number else 0
        return self.shard(number).sample(place - first)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        try:
            Store.__init__(self, state["directory"])
        except StoreError as error:
            raise StoreError(f"a store that was opened can no longer be: {error}") from error
        if self.fingerprint != state["fingerprint"]:
            raise StoreError(
                f"{self.directory} was replaced after it was opened: the manifest had the "
                f"fingerprint {state['fingerprint'][:12]}, now it has {self.fingerprint[:12]}; "
                f"{START_AGAIN}"
            )

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[samples]: the tokens of each sample, from the indices alone."""
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

    def verify(self) -> list[Problem]:
        """All that is broken, by every checksum and every rule; empty when the store is whole."""
        problems = list(verify(self.directory))
        file = self.directory / MANIFEST
        if file.is_file() and sha256_of(file) != self.fingerprint:
            problems.append(Problem(MANIFEST, "not the manifest that this store was opened with"))
        return problems

    def _filled_shards(self) -> list[int]:
        return [i for i, shard in enumerate(self.manifest.shards) if shard.samples]

    def index_of(self, row: int) -> int:
        """Where the sample of this source row stands; StoreError if it is not in the store."""
        number = row // self.manifest.spec.rows_per_shard
        if 0 <= number < len(self.manifest.shards) and self.manifest.shards[number].samples:
            found = np.flatnonzero(self.shard(number).rows() == row)
            if found.size:
                return (self._ends[number - 1] if number else 0) + int(found[0])
        last = self.manifest.shards[-1].last_row if self.manifest.shards else None
        raise StoreError(f"{self.directory} has no sample of row {row}; its last row is {last}")

    def shard(self, number: int) -> Shard:
        """The open files of a shard; those not used for longest are closed."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= self._most_open:
            self._open.popitem(last=False)
        shard = self._opened(self.manifest.shards[number])
        self._open[number] = shard
        return shard

    def _opened(self, info: ShardInfo) -> Shard:
        """The shard, which must be the one of the manifest that was read when the store was opened.

        Compared once the files are open: a shard that is replaced meanwhile has another entry then.
        """
        try:
            shard = Shard(self.directory, info, self.codec)
        except (OSError, StoreError):
            self._replacement.refuse(info)
            raise
        self._replacement.refuse(info)
        return shard

    def _refuse_other_files(self) -> None:
        """Names and sizes; without a Path for each file, which would be half of the time."""
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
                        f"{directory}/{name} {found}, the manifest says {info.bytes}; copy it "
                        f"again, or remove {directory} and run the dump again, which writes only "
                        "that shard"
                    )


def refuse_unfinished(directory: Path) -> None:
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
