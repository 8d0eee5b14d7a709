"""Progress display of a dump: a single bar for the job in a terminal, or lines in a log."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nemo_kd.sft import RowError
from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.counters import JobCounters
from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.tally import Tally
from nemo_kd.topk import TopK, t1_index

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REPORTS = 1.0
_MILLION = 1_000_000  # the job's counters are integers, so mass is counted in millionths


class DumpProgress:
    """Progress of the job, displayed by the first replica; every rank must create and close it.

    The writing rank of each replica (see `Layout`) counts its rows and adds the counts to the
    job-wide counters once a second and after its last row. The first replica's writing rank reads
    the counters whenever it updates the display.

    Collectives over all ranks: a small all-reduce on creation and a small all-gather in `summary`.
    """

    name = "dump"

    def __init__(
        self, todo: Sequence[int], done: int, num_rows: int, spec: StoreSpec, layout: Layout
    ) -> None:
        self.layout = layout
        self.shows = layout.writes and layout.replica == 0
        self.tally = Tally(spec)
        self.left_out = ""
        """Description of the rows that the job left out, set by `summary`."""
        self.truncated = 0
        """Number of truncated rows of the job, set by `summary`."""
        self.nothing = ""
        """Why this run of the job has kept nothing, set by `summary`; "" if it has, or had no rows.
        """
        size = spec.rows_per_shard
        self.mine = sum(min(size, num_rows - shard * size) for shard in todo)
        # A random key separates this dump's counters from those of other dumps in these processes.
        counts = [self.mine, done] if layout.writes else [0, 0]
        key = secrets.randbits(48) if layout.rank == 0 else 0
        self.total, self.skipped, key = layout.sum([*counts, key])
        names = ("rows", "tokens", "mass")
        self.job = JobCounters(layout.store(f"{self.name}/{key}"), names)
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
        if self.shows and self.skipped and not self.total:
            print(f"{self.name}: the store is complete; nothing is dumped", file=sys.stderr)
        elif self.shows and self.skipped:
            print(f"{self.name}: skipping {self.skipped} complete shards", file=sys.stderr)
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.shows and kind is None:
            self._show(last=True)
        self.bar.stop()

    def advance(self, pairs: Iterable[tuple[Row, TopK]]) -> None:
        """Count processed rows, given with their top-K, and update the display if it is due."""
        if not self.layout.writes:
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
        """Count rows that are left out, given their errors."""
        if errors and self.layout.writes:
            for error in errors:
                self.tally.drop(error)
            self.advance(())

    def summary(self) -> str:
        """Return the summary of this run over all ranks; empty if no rows were processed.

        Collective: all ranks must call it.
        """
        total = Tally.total(self.layout.gather(self.tally), self.tally.spec)
        self.left_out, self.truncated = total.left_out(), total.truncated
        if total.done and not total.rows:
            _, reason = max(zip(total.dropped, total.reasons, strict=True))
            self.nothing = f"all {total.done} rows were left out; one of them: {reason}"
        return total.summary()

    def _counted(self) -> dict[str, int]:
        mass = self.tally.mass[t1_index(self.tally.spec.temperatures)]
        return {
            "rows": self.tally.done,
            "tokens": self.tally.tokens,
            "mass": round(float(mass) * _MILLION),
        }

    def _show(self, last: bool = False) -> None:
        """Update the bar; without a terminal, print a line every 10 seconds and at the end."""
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
