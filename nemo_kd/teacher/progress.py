"""How far a dump is: one bar for the job in a terminal, plain lines in a log."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nemo_kd.sft import RowError
from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.counters import JobCounters
from nemo_kd.teacher.forward import AnswerTopK
from nemo_kd.teacher.tally import Tally
from nemo_kd.topk import t1_index

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REPORTS = 1.0
_MILLION = 1_000_000  # a mass is counted in millionths


class DumpProgress:
    """Progress of the whole job, shown by the first replica; made and ended by every rank.

    One rank of each replica holds the logits (last stage, first tensor rank). It counts, and adds
    what it has counted to the job's counters once a second and with its last row; the first
    replica's one reads them when it shows something. So shards may be uneven; once the first
    replica has no shard left, the bar waits for the end.

    Collectives over all ranks: one small sum when it is made, one small all-gather in `summary`.
    """

    name = "dump"

    def __init__(self, todo: Sequence[int], done: int, num_rows: int, spec: StoreSpec) -> None:
        self.counts = (
            parallel_state.is_pipeline_last_stage()
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        self.shows = self.counts and parallel_state.get_data_parallel_rank() == 0
        self.tally = Tally(spec)
        self.left_out = ""
        """Rows of the whole job that were left out, in words; known after `summary`."""
        self.t1 = t1_index(spec.temperatures)
        size = spec.rows_per_shard
        self.mine = sum(min(size, num_rows - shard * size) for shard in todo)
        self.total, self.skipped, key = self._agree(done)
        self.job = JobCounters(f"{self.name}/{key}", ("rows", "tokens", "mass"))
        self.reported = self._counted()
        self.start = self.last_line = self.last_report = time.monotonic()
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
        if self.shows and kind is None:
            self._show(last=True)
        self.bar.stop()

    def advance(self, pairs: Iterable[tuple[Row, AnswerTopK]]) -> None:
        if not self.counts:
            return
        for row, topk in pairs:
            self.tally.add(row, topk)
        now = time.monotonic()
        if now - self.last_report < SECONDS_BETWEEN_REPORTS and self.tally.done < self.mine:
            return
        self.last_report = now
        counted = self._counted()
        self.job.add(**{name: counted[name] - self.reported[name] for name in counted})
        self.reported = counted
        if self.shows:
            self._show()

    def drop(self, errors: Sequence[RowError]) -> None:
        """Rows that are left out: they are done."""
        if errors and self.counts:
            for error in errors:
                self.tally.drop(error)
            self.advance(())

    def summary(self) -> str:
        """What this run dumped, over all ranks; every rank calls it. Empty without new rows."""
        return self._total().summary()

    def _total(self) -> Tally:
        """The sum over all ranks, of which `left_out` is kept."""
        mine = self.tally.vector().to(torch.cuda.current_device())
        everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, mine)
        total = Tally.of((vector.cpu() for vector in everyone), self.tally.spec)
        self.left_out = total.left_out()
        return total

    def _agree(self, done: int) -> tuple[int, int, int]:
        """Rows to do and shards skipped of the whole job, and a key that no other dump has."""
        key = secrets.randbits(48) if torch.distributed.get_rank() == 0 else 0
        mine = [self.mine, done] if self.counts else [0, 0]
        sums = torch.tensor([*mine, key], dtype=torch.int64, device=torch.cuda.current_device())
        torch.distributed.all_reduce(sums)
        total, skipped, key = sums.tolist()
        return total, skipped, key

    def _counted(self) -> dict[str, int]:
        mass = round(float(self.tally.mass[self.t1]) * _MILLION)
        return {"rows": self.tally.done, "tokens": self.tally.tokens, "mass": mass}

    def _show(self, last: bool = False) -> None:
        """The bar in a terminal, else a line from time to time and at the end."""
        terminal = sys.stderr.isatty()
        if not terminal and not last and time.monotonic() - self.last_line < SECONDS_BETWEEN_LINES:
            return
        job = self.job.read()
        self.last_line = time.monotonic()
        spent = self.last_line - self.start
        kept = job["mass"] / _MILLION / max(job["tokens"], 1)
        rate = job["tokens"] / max(spent, 1e-9)
        note = f"{job['tokens']} answer tokens, {rate:.0f}/s, mass kept {kept:.3f}"
        self.bar.update(self.task, completed=job["rows"], note=note)
        if terminal or not job["rows"]:
            return
        left = spent * (self.total - job["rows"]) / job["rows"]
        print(
            f"{self.name}: {job['rows']}/{self.total} rows, {note}, {spent:.0f} s, "
            f"ETA {left:.0f} s",
            file=sys.stderr,
            flush=True,
        )
