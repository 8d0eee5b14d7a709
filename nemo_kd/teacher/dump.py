"""Dump a teacher's top-K over an SFT file into a store: sharded by rows, resumable by shard."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nemo_kd.files import read_json
from nemo_kd.sft import RowError, RowFile
from nemo_kd.sft.rows import Row, SFTRows, readable
from nemo_kd.sft.tokenizer import tokenizer_fingerprint
from nemo_kd.store import Manifest, Sample, Store, StoreSpec, StoreWriter, write_jsonl
from nemo_kd.store.earlier import EarlierStore
from nemo_kd.store.fingerprint import is_of_all
from nemo_kd.store.manifest import EXCHANGE, MANIFEST, SPEC, shard_name
from nemo_kd.store.ours import remove_part
from nemo_kd.teacher.begin import (
    Source,
    TokensOf,
    check_kept,
    check_rows,
    locked,
    open_writer,
    rows_of,
    shards_of,
)
from nemo_kd.teacher.checks import Company, check_teacher
from nemo_kd.teacher.config import DumpConfig
from nemo_kd.teacher.earlier_part import check_earlier_part
from nemo_kd.teacher.forward import sample_of, usable
from nemo_kd.teacher.identity import as_recorded, teacher_identity, with_idle_seed
from nemo_kd.teacher.interface import Forward, Teacher
from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.progress import DumpProgress
from nemo_kd.teacher.rows import bad_rows, sft_rows
from nemo_kd.teacher.stop import StopOnSignal
from nemo_kd.visible import visible

SAMPLES = "the sizes of the files and samples of their content are equal; not all of it is compared"


class Numbered(Protocol):
    """A row or a prompt, with a row number and a length in tokens."""

    @property
    def row(self) -> int: ...

    def __len__(self) -> int: ...


Work = TypeVar("Work", bound=Numbered)


def dump(config: DumpConfig, teacher: Teacher, rows: SFTRows | None = None) -> Manifest | None:
    """Run the teacher over `rows`, by default those of `data.file_path`, and write the store.

    Returns the store's manifest, or None if a signal stopped the dump: complete shards are kept,
    and the same command resumes.
    """
    rows = sft_rows(config, teacher) if rows is None else rows
    spec = store_spec(config, teacher, rows.file, rows.template)
    forward = teacher.forward(spec, config.rows_per_lm_head)

    company = Company()

    def check(numbers: Sequence[int]) -> None:
        nonlocal company
        company = check_teacher(config, teacher, spec, [rows[number] for number in numbers])
        if spec.teacher.get("fingerprint") is None:
            check_earlier_part(config.output_dir, spec, forward, teacher.layout)

    def samples(shard: int, progress: DumpProgress) -> Iterator[Sample]:
        numbers = rows_of(shard, spec, len(rows))
        return _samples(config, rows, numbers, forward, progress, company)

    def tokens(numbers: Sequence[int]) -> Iterator[Row]:
        return readable(rows, numbers, bad_rows(config), [])

    return write_store(config, spec, teacher.layout, rows, samples, check, tokens)


def write_store(
    config: DumpConfig,
    spec: StoreSpec,
    layout: Layout,
    source: Source,
    samples_of: Callable[[int, DumpProgress], Iterable[Sample]],
    check: Callable[[Sequence[int]], None],
    tokens_of: TokensOf | None = None,
    progress_class: type[DumpProgress] = DumpProgress,
) -> Manifest | None:
    """Write a store of `source` shard by shard.

    Returns its manifest, or None if a signal stopped the dump. Replica r writes the shards i with
    `i % replicas = r` that are not complete yet. `samples_of(shard, progress)` yields the samples
    of a shard in any order, on the writing rank; `check(row numbers)` is called before the first
    shard with the shortest and the longest row, on every rank; `tokens_of` is passed to
    `open_writer`.
    Raises RowError instead of writing a store of no row, because every row was left out, and for
    shards of an earlier run that left out rows, if this one is to leave out none.
    Collectives over all ranks: a few small ones before the first shard and after the last.
    """
    shards = shards_of(spec, len(source))
    mine = range(layout.replica, shards, layout.replicas)
    with locked(config.output_dir, layout) as check_lock:
        spec = moved(config, spec, layout)
        writer = _opened(config, spec, layout, source, mine, tokens_of)
        todo = [shard for shard in mine if not writer.is_complete(shard)]
        todo_rows = [row for shard in todo for row in rows_of(shard, spec, len(source))]
        # Its collective also keeps a rank from writing before others have listed complete shards.
        extremes = check_rows(source, todo_rows, bad_rows(config), layout)
        if tokens_of is not None:  # a generation leaves out answers as a matter of course
            check_kept(writer, spec, source, bad_rows(config), layout)
        if extremes is not None:
            check(extremes)
        done = len(mine) - len(todo)
        with (
            StopOnSignal(layout) as stop,
            progress_class(todo, done, len(source), spec, layout) as progress,
        ):
            for shard in todo:
                if stop.agreed_in_replica():
                    break
                check_lock()
                samples = list(samples_of(shard, progress))
                source.file.check_unchanged()
                if layout.writes:
                    with writer.shard(shard) as out:
                        for sample in sorted(samples, key=lambda sample: sample.row):
                            out.add(sample)
            stopped = stop.agreed()
        summary = progress.summary()
        if progress.nothing and not stopped:
            _refuse_nothing(writer, shards, progress.nothing, layout)
        if layout.rank == 0:
            if summary:
                print(visible(summary))
            if progress.left_out:
                layout.say(progress.left_out)
            check_lock()
            source.file.check_unchanged()
        if stopped:
            if layout.rank == 0:
                _say_stopped(config, writer, shards)
            layout.barrier()
            return None
        _join(writer, shards, config, layout)
    return Store(writer.directory).manifest


def _opened(
    config: DumpConfig,
    spec: StoreSpec,
    layout: Layout,
    source: Source,
    mine: Sequence[int],
    tokens_of: TokensOf | None,
) -> StoreWriter:
    """Open the writer of `output_dir`, and check the rows first if that changes a store there."""
    if layout.from_rank_0(layout.rank == 0 and _changes_a_store(config, spec)):
        mine_rows = [row for shard in mine for row in rows_of(shard, spec, len(source))]
        check_rows(source, mine_rows, bad_rows(config), layout, report=False)
    writer = open_writer(
        Path(config.output_dir),
        spec,
        layout,
        num_rows=len(source),
        tokens_of=tokens_of,
        overwrite=config.overwrite,
    )
    if config.segment_bytes is not None and (writer.directory / MANIFEST).exists():
        layout.say(
            f"segment_bytes={config.segment_bytes} has no effect on a complete store; for "
            f"other segments use `nemo-kd convert {config.output_dir} NEW --segment-bytes "
            f"{config.segment_bytes}`"
        )
    return writer


def _join(writer: StoreWriter, shards: int, config: DumpConfig, layout: Layout) -> None:
    """Join the complete shards into a store and publish it, each rank its part."""
    if layout.rank == 0:
        writer.begin_joining(shards, config.segment_bytes)
    layout.barrier()
    writer.join(slice(layout.rank, None, layout.size), _say_joined(layout))
    layout.barrier()
    if layout.rank == 0:
        writer.publish()
        if config.jsonl:
            write_jsonl(writer.directory / EXCHANGE, Store(writer.directory))
    layout.barrier()


def moved(config: DumpConfig, spec: StoreSpec, layout: Layout) -> StoreSpec:
    """Return `spec` with the names and paths of the store in `output_dir`, if only these differ.

    A checkpoint or a file with another name or place, but the same content, does not make another
    store. Collective over all ranks: a broadcast.
    """
    found: StoreSpec | None = None
    if layout.rank == 0 and not config.overwrite:
        path = Path(config.output_dir) / SPEC
        if path.exists():
            earlier = StoreSpec.from_json(read_json(path), spec.rows_per_shard)
            found = _as_in(earlier, config, spec, layout)
    found = layout.from_rank_0(found)
    return spec if found is None else found


def _as_in(earlier: StoreSpec, config: DumpConfig, spec: StoreSpec, layout: Layout) -> StoreSpec:
    """Return `spec` with the names, paths and fingerprint of `earlier` that stand for the same."""
    spec = with_idle_seed(spec, earlier)
    now, same = spec.teacher.get("fingerprint"), spec
    if now is not None:  # no server
        same = as_recorded(spec, earlier, config.model.checkpoint)
    if same is not spec:
        layout.say(
            f"{config.output_dir}: an earlier version has recorded the teacher's fingerprint, from "
            "samples of its files, and these are equal"
        )
    found, all_bytes = same.named_as(earlier), now is None or (same is spec and is_of_all(now))
    renamed = list(same.differences(found))
    for name, new, old in renamed:
        if all_bytes or name == "source.name":
            layout.say(f"{config.output_dir}: {name} is now {new}, with the content of {old}")
        else:
            layout.say(
                f"{config.output_dir}: {name} is now {new}, which is taken for {old}: {SAMPLES}"
            )
    of_source = all(name == "source.name" for name, _, _ in renamed)
    if of_source and not all_bytes and same is spec and now == earlier.teacher.get("fingerprint"):
        layout.say(
            f"{config.output_dir}: the teacher is taken for the one that the store has: {SAMPLES}"
        )
    return found


def _changes_a_store(config: DumpConfig, spec: StoreSpec) -> bool:
    """Whether this dump replaces a store, or corrects one of an earlier source."""
    if config.overwrite:
        return (Path(config.output_dir) / SPEC).exists()
    return EarlierStore.find(config.output_dir, spec) is not None


def _refuse_nothing(writer: StoreWriter, shards: int, why: str, layout: Layout) -> None:
    """Raise RowError for a run that has left out all of its rows, if no earlier run kept any.

    The shards, which are empty, are removed, so that the same command tries the rows again, and one
    with other settings does too (see `open_writer`). `why`: `DumpProgress.nothing`. Collective over
    all ranks: a broadcast.
    """
    if layout.from_rank_0(layout.rank == 0 and _has_samples(writer, shards)):
        return
    if layout.rank == 0:
        for shard in range(shards):
            remove_part(writer.directory / shard_name(shard))
    raise RowError(f"{writer.directory}: no store is written, because {why}")


def _has_samples(writer: StoreWriter, shards: int) -> bool:
    found = [writer.complete_shard(shard) for shard in range(shards)]
    return any(info is None or info.samples for info in found)


def _say_joined(layout: Layout) -> Callable[[int, int], None]:
    """Return a callback that reports rank 0's share of the segments, if it is more than one."""
    start = time.monotonic()

    def on_segment(done: int, total: int) -> None:
        left = (time.monotonic() - start) * (total - done) / done
        if total > 1:
            layout.say(f"joining the shards: {done} of {total} segments, {left:.0f} s left")

    return on_segment


def _say_stopped(config: DumpConfig, writer: StoreWriter, shards: int) -> None:
    complete = sum(writer.is_complete(shard) for shard in range(shards))
    print(
        f"interrupted: {complete} of {shards} shards are complete in {config.output_dir}; run "
        "the same command to resume"
    )


def store_spec(
    config: DumpConfig, teacher: Teacher, file: RowFile, template: Mapping[str, Any]
) -> StoreSpec:
    """Return the spec of this dump's store; only a store with an equal spec is resumed.

    `template`: the settings that made the tokens of the rows.
    """
    return StoreSpec(
        top_k=config.dump.top_k,
        vocab_size=teacher.tokenizer.vocab_size,
        temperatures=config.dump.temperatures,
        rows_per_shard=config.rows_per_shard,
        profile=config.dump.profile,
        profile_options=config.dump.profile_options,
        tokenizer={
            "fingerprint": tokenizer_fingerprint(teacher.tokenizer),
            **teacher.tokenizer_origin,
        },
        teacher=dict(teacher.identity or teacher_identity(config, config.model.checkpoint)),
        template=dict(template),
        source=_source(file),
    )


def _source(file: RowFile) -> dict[str, Any]:
    """Return name, rows and hash of the SFT file; those of each file too if there are several."""
    whole = {"name": file.path.name, "rows": len(file), "sha256": file.sha256}
    return {**whole, "files": file.files} if len(file.files) > 1 else whole


def _samples(
    config: DumpConfig,
    rows: SFTRows,
    numbers: range,
    forward: Forward,
    progress: DumpProgress,
    company: Company,
) -> Iterator[Sample]:
    """Yield the samples of the given rows, longest first; nothing on ranks without logits."""
    bad, dropped = bad_rows(config), list[RowError]()
    batch = list(readable(rows, numbers, bad, dropped))
    progress.drop(dropped)
    for call, micro_batch_size in _calls(config, batch, progress.layout, company):
        results = forward(call, micro_batch_size)
        if results is None:
            continue
        dropped = []
        # After an error, a pass that is a generator must end now, not when it is collected.
        with closing(results) if isinstance(results, Generator) else nullcontext():
            for row, topk in usable(zip(call, results, strict=True), rows.file, bad, dropped):
                yield sample_of(row, topk)
                progress.advance([(row, topk)])
        progress.drop(dropped)


def _calls(
    config: DumpConfig, rows: list[Row], layout: Layout, company: Company
) -> Iterator[tuple[list[Row], int]]:
    """Group rows into forward calls of one micro-batch, more for pipeline stages.

    A server makes its own batches: it gets all rows in one call.
    """
    if config.teacher.kind == "served":
        return calls(rows, 1, sys.maxsize, len(rows))
    # Several micro-batches in flight keep the pipeline stages busy.
    in_flight = 1 if layout.stages == 1 or company.alone else 2 * layout.stages
    limit = config.max_tokens_per_micro_batch or sys.maxsize
    size = 1 if company.alone else config.model.micro_batch_size
    return calls(rows, size, limit, in_flight, lambda row: company.group(len(row) - 1))


def calls(
    rows: list[Work],
    micro_batch_size: int,
    max_tokens: int,
    in_flight: int,
    group: Callable[[Work], object] = lambda row: 0,
) -> Iterator[tuple[list[Work], int]]:
    """Group rows of similar length into forward calls; yield each group and its micro-batch size.

    A micro-batch has at most `micro_batch_size` rows and `max_tokens` tokens, but at least one row.
    A call has at most `in_flight` micro-batches. Megatron's schedules need micro-batches of equal
    size, so that the remainder is processed in smaller calls. A call has rows of one `group`, which
    depends on their length.
    """
    for _, together in groupby(sorted(rows, key=lambda row: (-len(row), row.row)), group):
        yield from _calls_of_group(list(together), micro_batch_size, max_tokens, in_flight)


def _calls_of_group(
    ordered: list[Work], micro_batch_size: int, max_tokens: int, in_flight: int
) -> Iterator[tuple[list[Work], int]]:
    start = 0
    while start < len(ordered):
        left = len(ordered) - start
        fitting = min(max_tokens // len(ordered[start]), left)
        size = max(min(micro_batch_size, fitting), 1)
        count = size * min(in_flight, left // size)
        yield ordered[start : start + count], size
        start += count
