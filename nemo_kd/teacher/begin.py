"""Before a teacher's first pass: lock the directory, keep the shards it has, check the rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from omegaconf import DictConfig

from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.rows import BadRows
from nemo_kd.store import StoreError, StoreSpec, StoreWriter
from nemo_kd.store.earlier import EarlierStore
from nemo_kd.store.lock import DirectoryLock, LockedError
from nemo_kd.store.sample import Tokens

SHOWN = 5
"""Bad rows that a message names."""
SECONDS_BETWEEN_LINES = 10.0
REMEDY = (
    "Mend the rows, or leave them out: on_bad_row=drop those that cannot be read, "
    "data.no_answer=drop those without an answer token"
)


class Source(Protocol):
    """What a store is written of, by store row."""

    file: JsonlFile
    samples_per_row: int
    """Store rows that one row of the file makes."""

    def __len__(self) -> int: ...

    def check(self, row: int) -> None:
        """RowError for a row that nothing can be made of."""


TokensOf = Callable[[Sequence[int]], Iterable[Tokens]]


@contextmanager
def locked(directory: str) -> Iterator[Callable[[], None]]:
    """Within it no other job writes to `directory`; yields what asks whether that is still so.

    Rank 0 has the lock. Errors, on every rank: StoreError where another job has it.
    """
    lock, refusal = DirectoryLock(directory), ""
    if torch.distributed.get_rank() == 0:
        try:
            lock.__enter__()
        except StoreError as error:
            refusal = str(error)
    refusal = _from_rank_0(refusal)
    if refusal:
        raise LockedError(refusal)
    if torch.distributed.get_rank():
        yield lambda: None
        return
    try:
        yield lock.check
    finally:
        lock.__exit__(None, None, None)


def open_writer(
    cfg: DictConfig, spec: StoreSpec, num_rows: int, tokens_of: TokensOf | None
) -> StoreWriter:
    """The store's writer; rank 0 prepares the directory, the others find it as it left it.

    Where the source file has changed since the store was begun, the shards are kept whose rows
    `tokens_of(their numbers)` are as they were; with None such a store is refused.
    """
    directory, earlier = Path(cfg.output_dir), None
    if torch.distributed.get_rank() == 0 and cfg.overwrite:
        StoreWriter(directory, spec, overwrite=True)
    torch.distributed.barrier()
    earlier = EarlierStore.find(directory, spec)
    torch.distributed.barrier()
    if earlier is not None and (tokens_of is not None or not earlier.shards):
        _keep_unchanged(earlier, spec.rows_per_shard, num_rows, tokens_of)
    if torch.distributed.get_rank() == 0:
        StoreWriter(directory, spec)
    torch.distributed.barrier()
    return StoreWriter(directory, spec)


def _keep_unchanged(
    earlier: EarlierStore, rows_per_shard: int, num_rows: int, tokens_of: TokensOf | None
) -> None:
    """Shard i is compared by rank `i % ranks`."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shards = earlier.shards
    torch.distributed.barrier()  # all must have looked before one changes anything
    if rank == 0:
        earlier.begin()
    torch.distributed.barrier()
    kept = 0
    for shard in shards[rank::ranks]:
        rows = range(shard * rows_per_shard, min((shard + 1) * rows_per_shard, num_rows))
        if rows and tokens_of is not None:
            kept += earlier.keep(shard, tokens_of(rows))
    kept = sum(_gathered(kept))
    if rank == 0:
        earlier.finish(-(-num_rows // rows_per_shard))
        if shards:
            _say(
                f"{earlier.directory}: the source file has changed since this store was begun; "
                f"{kept} of its {len(shards)} finished shards have the same rows and are kept, "
                f"{len(shards) - kept} are made again or removed"
            )
    torch.distributed.barrier()


def check_rows(source: Source, todo: Sequence[int], bad: BadRows) -> None:
    """Read all rows of this replica's `todo`, each rank of it a share, before the first pass.

    Errors, on every rank: RowError that names the first bad rows of all replicas, unless `bad`
    leaves them out; also where no row of the source is left. Collectives over all ranks: an
    all-gather of a few strings.
    """
    group = parallel_state.get_model_parallel_group()
    todo = [row for row in todo if row % source.samples_per_row == 0]
    share = todo[torch.distributed.get_rank(group) :: torch.distributed.get_world_size(group)]
    refused, dropped = _Found(), _Found()
    last = time.monotonic()
    for count, row in enumerate(share, start=1):
        try:
            source.check(row)
        except RowError as error:
            (dropped if bad.drops(error) else refused).add(row, error)
        if time.monotonic() - last > SECONDS_BETWEEN_LINES and not torch.distributed.get_rank():
            last = time.monotonic()
            _say(f"reading the rows before the first pass: {count} of {len(share)} of this rank")
    parts = _gathered((len(share), refused, dropped))
    refused, dropped = _Found.of(p[1] for p in parts), _Found.of(p[2] for p in parts)
    path, checked = source.file.path, sum(part[0] for part in parts)
    if refused.count:
        raise RowError(f"{path}: {refused.text(path, checked)}\n{REMEDY}")
    if dropped.count and dropped.count == len(source.file):
        raise RowError(f"{path}: nothing is left to dump, {dropped.text(path, checked)}")
    if dropped.count and not torch.distributed.get_rank():
        _say(f"{path}: left out, {dropped.text(path, checked)}")


class _Found:
    """Bad rows: how many, and the first few in words."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[tuple[int, str]] = []

    def add(self, row: int, error: RowError) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((row, str(error)))

    @classmethod
    def of(cls, parts: Iterable[_Found]) -> _Found:
        """Those of several ranks."""
        found = cls()
        for part in parts:
            found.count += part.count
            found.first = sorted(found.first + part.first)[:SHOWN]
        return found

    def text(self, path: Path, checked: int) -> str:
        lines = [error.removeprefix(f"{path}, ") for _, error in self.first]
        more = [f"and {self.count - len(lines)} more"] * (self.count > len(lines))
        shown = "".join(f"\n  {line}" for line in [*lines, *more])
        return f"{self.count} of {checked} rows that cannot be used:{shown}"


def _from_rank_0(text: str) -> str:
    texts = [text]
    torch.distributed.broadcast_object_list(texts, src=0)
    return texts[0]


def _gathered(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
