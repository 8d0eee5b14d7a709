"""How far a dump is: a bar in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

import torch
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nemo_kd.store import StoreSpec
from nemo_kd.teacher.forward import AnswerTopK
from nemo_kd.teacher.rows import Row

SECONDS_BETWEEN_LINES = 10.0


# Below this the prompt template or the tokenizer is probably not the teacher's.
LOW_AGREEMENT = 0.1


class DumpProgress:
    """Progress of one data-parallel rank's share; only the first replica's last stage shows it.

    That rank holds the logits, so it can say how much of the teacher's mass the K logits keep and
    how often the teacher's best token is the label.
    """

    name = "dump"

    def __init__(self, todo: Sequence[int], done: int, num_rows: int, spec: StoreSpec) -> None:
        self.total = sum(
            min(spec.rows_per_shard, num_rows - shard * spec.rows_per_shard) for shard in todo
        )
        self.skipped = done
        self.top_k = spec.top_k
        self.place_of_one = spec.temperatures.index(1.0)
        self.counts = (
            parallel_state.is_pipeline_last_stage()
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        self.shows = self.counts and parallel_state.get_data_parallel_rank() == 0
        self.rows = self.tokens = self.agreed = 0
        self.mass = 0.0
        self.start = self.last_line = time.monotonic()
        self.bar = Progress(
            TextColumn(self.name),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} rows  {task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (self.shows and sys.stderr.isatty()),
        )
        self.task = self.bar.add_task(self.name, total=self.total, note="")

    def __enter__(self) -> DumpProgress:
        if self.shows and self.skipped:
            print(f"{self.name}: {self.skipped} shards are whole already, skipped", file=sys.stderr)
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        if self.shows and kind is None and self.rows:
            self._line()

    def advance(self, rows: Sequence[Row], topk: Sequence[AnswerTopK] | None) -> None:
        if not self.counts:
            return
        self.rows += len(rows)
        for row, result in zip(rows, topk or (), strict=True):
            logsumexp = result.logsumexp[:, self.place_of_one, None]
            self.mass += float(torch.exp(result.logits.float() - logsumexp).sum())
            labels = torch.from_numpy(row.input_ids[1:][row.loss_mask[1:] == 1].astype("int64"))
            self.agreed += int((result.ids[:, 0] == labels).sum())
            self.tokens += len(result.logits)
        if not self.shows:
            return
        self.bar.update(self.task, completed=self.rows, note=self._note())
        if not sys.stderr.isatty() and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self._line()

    def summary(self) -> str:
        """What this run dumped, over all ranks; every rank calls it. Empty without new rows."""
        mine = [self.rows, self.tokens, self.mass, self.agreed] if self.counts else [0.0] * 4
        sums = torch.tensor(mine, dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.all_reduce(sums)
        rows, tokens, mass, agreed = sums.tolist()
        if not tokens:
            return ""
        text = (
            f"this run: {rows:.0f} rows, {tokens:.0f} answer tokens; the {self.top_k} logits hold "
            f"{mass / tokens:.3f} of the teacher's mass, its best token is the label for "
            f"{agreed / tokens:.1%}"
        )
        if agreed < LOW_AGREEMENT * tokens:
            text += (
                f"\nWARNING: below {LOW_AGREEMENT:.0%}: is data.prompt_template the one that the "
                "teacher was trained on, and is this its tokenizer? `nemo-kd show` shows rows."
            )
        return text

    def _note(self) -> str:
        rate = self.tokens / max(time.monotonic() - self.start, 1e-9)
        kept = self.mass / max(self.tokens, 1)
        return f"{self.tokens} answer tokens, {rate:.0f}/s, mass kept {kept:.3f}"

    def _line(self) -> None:
        self.last_line = time.monotonic()
        spent = self.last_line - self.start
        left = spent * (self.total - self.rows) / max(self.rows, 1)
        print(
            f"{self.name}: {self.rows}/{self.total} rows, {self._note()}, {spent:.0f} s, "
            f"ETA {left:.0f} s",
            file=sys.stderr,
            flush=True,
        )
