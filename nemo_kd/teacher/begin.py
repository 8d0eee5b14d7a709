"""Preparation of a dump: lock the store's directory, keep finished shards, check the rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from nemo_kd.errors import StoreError
from nemo_kd.files import read_json
from nemo_kd.lock import DirectoryLock, LockedError
from nemo_kd.sft import RowError, RowFile
from nemo_kd.sft.checks import BadRowErrors, Seen
from nemo_kd.sft.rows import BadRows, Check
from nemo_kd.store import StoreSpec, StoreWriter
from nemo_kd.store.earlier import EarlierStore
from nemo_kd.store.manifest import MANIFEST, PACKING, REPLACED, SPEC, Manifest
from nemo_kd.store.ours import is_store, refuse_foreign
from nemo_kd.store.parts import part_directories
from nemo_kd.store.sample import Tokens
from nemo_kd.teacher.layout import Layout

SECONDS_BETWEEN_LINES = 10.0
REMEDY = (
    "Fix the rows, or drop them: on_bad_row=drop for those that cannot be read, "
    "data.no_answer=drop for those without an answer token"
)


class Source(Protocol):
    """The rows of an SFT file from which the rows of a store are made."""

    file: RowFile
    samples_per_row: int
    """Number of store rows per row of the file."""

    def __len__(self) -> int: ...

    @property
    def limit(self) -> str:
        """What truncates rows, for a message."""

    @property
    def altered_by(self) -> str:
        """What changes the text of altered rows, for a message."""

    def check(self, row: int) -> Check:
        """Return what is noticed about a store row; raise RowError if it cannot be made."""


TokensOf = Callable[[Sequence[int]], Iterable[Tokens]]


def rows_of(shard: int, spec: StoreSpec, num_rows: int) -> range:
    """Return the row numbers of a shard, given `num_rows` rows in total."""
    return range(shard * spec.rows_per_shard, min((shard + 1) * spec.rows_per_shard, num_rows))


def shards_of(spec: StoreSpec, num_rows: int) -> int:
    """Return the number of shards that hold `num_rows` rows."""
    return -(-num_rows // spec.rows_per_shard)


@contextmanager
def locked(directory: str, layout: Layout) -> Iterator[Callable[[], None]]:
    """Lock `directory` against other jobs; yield a function that checks that the lock is held.

    Rank 0 holds the lock. Raises LockedError on every rank if another job holds it.
    """
    lock, refusal = DirectoryLock(directory), ""
    if layout.rank == 0:
        try:
            lock.__enter__()
        except StoreError as error:
            refusal = str(error)
    refusal = layout.from_rank_0(refusal)
    if refusal:
        raise LockedError(refusal)
    if layout.rank:
        yield lambda: None
        return
    try:
        yield lock.check
    finally:
        lock.__exit__(None, None, None)


def open_writer(
    directory: Path,
    spec: StoreSpec,
    layout: Layout,
    *,
    num_rows: int,
    tokens_of: TokensOf | None,
    overwrite: bool,
) -> StoreWriter:
    """Open the store's writer on every rank, after rank 0 has prepared the directory.

    If the source file has changed since the store was started, shards are kept if their rows,
    `tokens_of(row numbers)`, are unchanged. Such a store is rejected like one of another
    configuration if it has complete shards and there is no `tokens_of`, or if it is finished and
    none of its samples is still in the source: that is another file, not a corrected one. A store
    without a complete shard, in which nothing can be lost, is started anew with any spec.
    """
    if layout.rank == 0 and overwrite:
        StoreWriter(directory, spec, overwrite=True)
        if (directory / REPLACED).exists():
            layout.say(
                f"{directory}: the old store is kept in {REPLACED} until the new one is complete"
            )
    elif layout.rank == 0:
        _drop_unused_spec(directory, spec)
    layout.barrier()
    earlier = EarlierStore.find(directory, spec)
    layout.barrier()
    if earlier is not None and _is_corrected(earlier, num_rows, tokens_of, layout):
        _keep_unchanged(earlier, spec, num_rows, tokens_of, layout)
    if layout.rank == 0:
        StoreWriter(directory, spec)
    layout.barrier()
    return StoreWriter(directory, spec)


def _drop_unused_spec(directory: Path, spec: StoreSpec) -> None:
    """Remove another spec than `spec` from a directory that has nothing else of a store."""
    rest = any((directory / name).exists() for name in (MANIFEST, PACKING, REPLACED))
    if rest or part_directories(directory) or not is_store(directory):
        return
    earlier = StoreSpec.from_json(read_json(directory / SPEC), spec.rows_per_shard)
    if earlier.resumable_json() != spec.resumable_json():
        refuse_foreign(directory)
        (directory / SPEC).unlink()


def _is_corrected(
    earlier: EarlierStore, num_rows: int, tokens_of: TokensOf | None, layout: Layout
) -> bool:
    """Whether the store may become that of the changed source; the same on every rank."""
    if tokens_of is None:
        return not (earlier.shards or earlier.finished)
    if not earlier.finished:
        return True
    return layout.from_rank_0(layout.rank == 0 and earlier.has_rows_of(num_rows, tokens_of))


def _keep_unchanged(
    earlier: EarlierStore,
    spec: StoreSpec,
    num_rows: int,
    tokens_of: TokensOf | None,
    layout: Layout,
) -> None:
    """Keep the shards whose rows are unchanged; the ranks share the comparisons."""
    if layout.rank == 0:
        earlier.unpack()
    layout.barrier()
    shards = earlier.shards
    layout.barrier()  # every rank must list the shards before any rank changes them
    if layout.rank == 0:
        earlier.begin()
    layout.barrier()
    kept = 0
    for shard in shards[layout.rank :: layout.size]:
        rows = rows_of(shard, spec, num_rows)
        if rows and tokens_of is not None:
            kept += earlier.keep(shard, tokens_of(rows))
    (kept,) = layout.sum([kept])
    if layout.rank == 0:
        earlier.finish(shards_of(spec, num_rows))
    if shards:
        layout.say(
            f"{earlier.directory}: the source file has changed since this store was begun; "
            f"{kept} of {len(shards)} complete shards have unchanged rows and are kept, "
            f"{len(shards) - kept} are dumped again or removed"
        )
    layout.barrier()


def check_kept(
    writer: StoreWriter, spec: StoreSpec, source: Source, bad: BadRows, layout: Layout
) -> None:
    """Raise RowError on every rank if kept shards lack rows that `bad` would not drop.

    These were left out by an earlier run with other settings. Collective: a broadcast.
    """
    left_out = 0
    if layout.rank == 0 and not (bad.drop_bad and bad.drop_unanswered):
        numbers, samples = [*range(shards_of(spec, len(source)))], 0
        if (writer.directory / MANIFEST).exists():
            samples = Manifest.read(writer.directory).totals["samples"]
        else:
            found = [(shard, writer.complete_shard(shard)) for shard in numbers]
            numbers = [shard for shard, info in found if info is not None]
            samples = sum(info.samples for _, info in found if info is not None)
        rows = [row for shard in numbers for row in rows_of(shard, spec, len(source))]
        left_out = _left_out(source, rows, len(rows) - samples, bad)
    refusal = ""
    if left_out:
        refusal = (
            f"{writer.directory}: an earlier run, with on_bad_row=drop or data.no_answer=drop, has "
            f"left out {left_out} rows of the complete shards; set the same again to keep these "
            "shards, or overwrite=true to dump all rows again"
        )
    refusal = layout.from_rank_0(refusal)
    if refusal:
        raise RowError(refusal)


def _left_out(source: Source, rows: Sequence[int], lacking: int, bad: BadRows) -> int:
    """Return how many of the `lacking` ones of these rows `bad` would not drop."""
    if not lacking or not (bad.drop_bad or bad.drop_unanswered):
        return lacking
    unusable = refused = 0
    for row in rows:
        try:
            source.check(row)
        except RowError as error:
            unusable += 1
            refused += not bad.drops(error)
    by_the_teacher = 0 if bad.drop_bad else lacking - unusable  # for logits that are NaN
    return refused + by_the_teacher


def check_rows(
    source: Source, todo: Sequence[int], bad: BadRows, layout: Layout, *, report: bool = True
) -> tuple[int, int] | None:
    """Check the rows `todo` of this replica, divided among its ranks, before the first pass.

    With `report` rank 0 prints how many rows are left out, truncated or altered.

    Returns the numbers of the shortest and the longest row of all replicas; None without a row.
    Raises RowError on every rank, naming the first bad rows of all replicas, if there are any that
    `bad` does not drop, or if no row of the source is left. Collectives over all ranks: an
    all-gather of a few strings.
    """
    share = layout.share([row for row in todo if row % source.samples_per_row == 0])
    refused, dropped, seen = BadRowErrors(), BadRowErrors(), Seen()
    lengths: list[tuple[int, int]] = []
    last = time.monotonic()
    for count, row in enumerate(share, start=1):
        try:
            found = source.check(row)
            seen.add(found)
            lengths.append((found.length, row))
        except RowError as error:
            (dropped if bad.drops(error) else refused).add(row, error)
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            layout.say(f"checking the rows before the first pass: {count} of {len(share)}")
    lengths = [min(lengths), max(lengths)] if lengths else []
    parts = layout.gather((len(share), refused, dropped, lengths, seen))
    refused, dropped = BadRowErrors.of(p[1] for p in parts), BadRowErrors.of(p[2] for p in parts)
    path, checked = source.file.path, sum(part[0] for part in parts)
    if refused.count:
        raise RowError(f"{path}: {refused.text(path, checked)}\n{REMEDY}")
    if dropped.count and dropped.count == len(source.file):
        raise RowError(f"{path}: no row is left to dump: {dropped.text(path, checked)}")
    if report and dropped.count:
        layout.say(f"{path}: left out {dropped.text(path, checked)}")
    if report:
        seen = Seen.of(part[4] for part in parts)
        for line in seen.lines(f"of {checked} rows", source.limit, source.altered_by):
            layout.say(f"{path}: {line}")
    lengths = [each for part in parts for each in part[3]]
    return (min(lengths)[1], max(lengths)[1]) if lengths else None
