"""Dump a teacher's top-K over an SFT file into a store: sharded by rows, resumable by shard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from megatron.core import parallel_state
from omegaconf import DictConfig

from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.rows import TEMPLATE_KEYS, BadRows, Row, SFTRows, Teacher, readable
from nemo_kd.sft.tokenizer import tokenizer_fingerprint
from nemo_kd.store import Manifest, Sample, Store, StoreSpec, StoreWriter, write_jsonl
from nemo_kd.store.fingerprint import checkpoint_fingerprint
from nemo_kd.store.manifest import EXCHANGE
from nemo_kd.store.sample import Tokens
from nemo_kd.teacher.begin import Source, TokensOf, check_rows, locked, open_writer
from nemo_kd.teacher.forward import AnswerTopK, sample_of, split_unusable
from nemo_kd.teacher.progress import DumpProgress
from nemo_kd.teacher.stop import StopOnSignal


class Forward(Protocol):
    """Rows in, the top-K of their answer tokens out; None on ranks that hold no logits."""

    def __call__(self, rows: Sequence[Row], micro_batch_size: int) -> list[AnswerTopK] | None: ...


class Numbered(Protocol):
    """Rows and prompts: some tokens of one row."""

    @property
    def row(self) -> int: ...

    def __len__(self) -> int: ...


Work = TypeVar("Work", bound=Numbered)


def dump(cfg: DictConfig, model: Teacher, forward_class: Callable[..., Forward]) -> Manifest | None:
    """Every row of `data.file_path` through the teacher; the manifest of the finished store.

    None when a signal asked to stop: what is whole stays, the same command goes on.
    """
    rows, bad = SFTRows(model, cfg.data), BadRows.of(cfg)
    spec = store_spec(cfg, model, rows.file)
    forward = forward_class(model, spec, cfg.rows_per_lm_head)

    def samples(shard: int, progress: DumpProgress) -> Iterator[Sample]:
        return shard_samples(rows, shard, spec, forward, cfg, progress)

    def tokens(numbers: Sequence[int]) -> Iterator[Tokens]:
        for row in readable(rows, numbers, bad, []):
            yield Tokens(row.row, row.input_ids, row.loss_mask)

    return write_store(cfg, spec, rows, samples, tokens)


def write_store(
    cfg: DictConfig,
    spec: StoreSpec,
    source: Source,
    samples_of: Callable[[int, DumpProgress], Iterable[Sample]],
    tokens_of: TokensOf | None = None,
    progress_class: type[DumpProgress] = DumpProgress,
) -> Manifest | None:
    """The store of `source`, shard by shard; its manifest, or None when a signal stopped it.

    Shard i is the work of data-parallel rank `i % DP`; shards that are whole already are skipped.
    `samples_of(shard, progress)` gives a shard's samples in any order, on the rank of each replica
    that holds logits; `tokens_of` is `open_writer`'s. Collectives over all ranks: a few small ones
    before the first shard, one small sum after the last.
    """
    with locked(cfg.output_dir) as check_lock:
        writer = open_writer(cfg, spec, len(source), tokens_of)
        shards = -(-len(source) // spec.rows_per_shard)
        mine = range(
            parallel_state.get_data_parallel_rank(),
            shards,
            parallel_state.get_data_parallel_world_size(),
        )
        todo = [shard for shard in mine if not writer.is_whole(shard)]
        check_rows(source, _rows_of(todo, spec, len(source)), BadRows.of(cfg))
        # So all ranks of a replica have looked before one writes.
        with (
            StopOnSignal() as stop,
            progress_class(todo, len(mine) - len(todo), len(source), spec) as progress,
        ):
            for shard in todo:
                if stop.agreed():
                    break
                check_lock()
                samples = list(samples_of(shard, progress))
                source.file.check_unchanged()
                if _writes():
                    with writer.shard(shard) as out:
                        for sample in sorted(samples, key=lambda sample: sample.row):
                            out.add(sample)
            stopped = stop.agreed(torch.distributed.group.WORLD)
        summary = progress.summary()
        if torch.distributed.get_rank() == 0:
            if summary:
                print(summary)
            if progress.left_out:
                print(progress.left_out, file=sys.stderr)
            check_lock()
            source.file.check_unchanged()
            _finish(cfg, writer, shards, stopped)
        torch.distributed.barrier()
    return None if stopped else Store(writer.directory).manifest


def _finish(cfg: DictConfig, writer: StoreWriter, shards: int, stopped: bool) -> None:
    """The manifest and the exchange file; or, of a dump that was stopped, how far it is."""
    if stopped:
        whole = sum(writer.is_whole(shard) for shard in range(shards))
        print(
            f"stopped by a signal: {whole} of {shards} shards are whole in {cfg.output_dir}; "
            "give the same command again to go on"
        )
        return
    writer.finish(shards)
    if cfg.jsonl:
        write_jsonl(writer.directory / EXCHANGE, Store(writer.directory))


def _writes() -> bool:
    """Whether this rank is the one of its replica that writes."""
    return parallel_state.is_pipeline_last_stage() and not (
        parallel_state.get_tensor_model_parallel_rank()
    )


def _rows_of(shards: Iterable[int], spec: StoreSpec, num_rows: int) -> list[int]:
    size = spec.rows_per_shard
    return [
        row for shard in shards for row in range(shard * size, min((shard + 1) * size, num_rows))
    ]


def store_spec(cfg: DictConfig, model: Teacher, file: JsonlFile) -> StoreSpec:
    """What this dump's store is: a resume under another spec is refused by the writer."""
    teacher = Path(cfg.model.restore_from_path)
    tokenizer = model.cfg.tokenizer
    return StoreSpec(
        top_k=cfg.model.kd.top_k,
        vocab_size=model.tokenizer.vocab_size,
        temperatures=tuple(cfg.model.kd.temperatures),
        rows_per_shard=cfg.rows_per_shard,
        profile=cfg.model.kd.profile,
        profile_options=dict(cfg.model.kd.profile_options),
        tokenizer={
            "fingerprint": tokenizer_fingerprint(model.tokenizer),
            "library": tokenizer.library,
            # A tokenizer inside the .nemo is unpacked elsewhere at each start: it has no path.
            "path": tokenizer.get("type"),
        },
        teacher={
            "name": teacher.name,
            "fingerprint": checkpoint_fingerprint(teacher),
            "precision": str(cfg.trainer.precision),
        },
        template={
            **{key: cfg.data.get(key) for key in TEMPLATE_KEYS},
            "answer_only_loss": cfg.model.answer_only_loss,
        },
        source={"name": file.path.name, "rows": len(file), "sha256": file.sha256},
    )


def shard_samples(
    rows: SFTRows,
    shard: int,
    spec: StoreSpec,
    forward: Forward,
    cfg: DictConfig,
    progress: DumpProgress,
) -> Iterator[Sample]:
    """The samples of one shard, by falling length; nothing on ranks that hold no logits."""
    first = shard * spec.rows_per_shard
    numbers = range(first, min(first + spec.rows_per_shard, len(rows)))
    bad, dropped = BadRows.of(cfg), list[RowError]()
    batch = list(readable(rows, numbers, bad, dropped))
    progress.drop(dropped)
    # More than one micro-batch in flight keeps the stages of a pipeline busy.
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    in_flight = 1 if stages == 1 else 2 * stages
    limit = cfg.max_tokens_per_micro_batch or sys.maxsize
    for call, micro_batch_size in calls(batch, cfg.model.micro_batch_size, limit, in_flight):
        results = forward(call, micro_batch_size)
        if results is None:
            continue
        pairs = zip(call, results, strict=True)
        kept, unusable = split_unusable(pairs, rows.file.path, bad)
        for row, topk in kept:
            yield sample_of(row, topk, spec)
        progress.drop(unusable)
        progress.advance(kept)


def calls(
    rows: list[Work], micro_batch_size: int, max_tokens: int, in_flight: int
) -> Iterator[tuple[list[Work], int]]:
    """Rows of like length for one forward call each, with the micro-batch size of the call.

    A micro-batch has at most `micro_batch_size` rows and `max_tokens` tokens (one row always
    goes). Megatron wants equal micro-batches in a call: what is left over becomes smaller calls.
    """
    ordered = sorted(rows, key=lambda row: (-len(row), row.row))
    start = 0
    while start < len(ordered):
        left = len(ordered) - start
        fitting = min(max_tokens // len(ordered[start]), left)
        size = max(min(micro_batch_size, fitting), 1)
        count = size * min(in_flight, left // size)
        yield ordered[start : start + count], size
        start += count
