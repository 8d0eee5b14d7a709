"""Run a command of the package's scripts once; a marker file records that it is done.

A command that is killed leaves no marker and is run again: dumps and trainings resume, the product
of other commands is removed first. A marker holds its command: if the configuration now gives
another one, the queue stops instead of using the old product.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nemo_kd.errors import NemoKDError
from nemo_kd.files import publish

ROOT = Path(__file__).resolve().parents[1]
MAX_WORD = 160
"""Characters of an argument in an error message."""


class StepFailedError(NemoKDError):
    """A command failed or did not write its product."""


@dataclass(frozen=True)
class Step:
    """A command that writes `product`."""

    name: str
    """A unique name; the marker is `done/<name>.json`."""
    arguments: tuple[str, ...]
    """A script of the repository, or `nemo-kd`, followed by its arguments."""
    product: Path
    resumes_in: Path | None = None
    """Directory from which the command resumes a half-finished product; None: it does not."""

    @property
    def command(self) -> list[str]:
        first, *rest = self.arguments
        if first == "nemo-kd":
            return [str(Path(sys.executable).with_name(first)), *rest]
        return [sys.executable, str(ROOT / first), *rest]


@dataclass(frozen=True)
class Workshop:
    """Runs steps and keeps their logs and markers."""

    out: Path
    threads: int

    def marker(self, step: Step) -> Path:
        return self.out / "done" / f"{step.name}.json"

    def is_done(self, step: Step) -> bool:
        """Whether the step succeeded in this or an earlier process.

        Errors: NemoKDError if it did so with another command, or its product is gone.
        """
        marker = self.marker(step)
        if not marker.is_file():
            return False
        before, now = json.loads(marker.read_text(encoding="utf-8"))["command"], self._shown(step)
        if before != now:
            made = step.resumes_in or step.product
            raise NemoKDError(
                f"{step.name} was made in {self.out} with other settings: {difference(before, now)}"
                f"; give another out=, or remove {marker}, {made} and what was made from it"
            )
        if not step.product.exists():
            raise NemoKDError(
                f"{step.name} is done, but {step.product} is gone; put it back, give another out=, "
                f"or remove {marker} to run the step again"
            )
        return True

    def forget(self, step: Step) -> None:
        """Remove the marker and the product, so that the step is run again."""
        self.marker(step).unlink(missing_ok=True)
        remove(step.product)

    def seconds(self, step: Step) -> float:
        """Seconds of the last successful run."""
        return float(json.loads(self.marker(step).read_text(encoding="utf-8"))["seconds"])

    def run(self, step: Step) -> None:
        """Run the step unless it is done, once another process that runs it has ended.

        Errors: StepFailedError, which names the log; NemoKDError as in `is_done`.
        """
        if self.is_done(step):
            return
        with claim(self.out / "locks" / step.name, wait=True):
            if not self.is_done(step):
                self._run(step)

    def _shown(self, step: Step) -> str:
        """The command as the marker holds it: the same wherever `out` is."""
        return shlex.join(["python", *step.arguments]).replace(str(self.out), "outputs")

    def _run(self, step: Step) -> None:
        shown = self._shown(step)
        print(f"== {step.name}\n   {shown}", flush=True)
        if step.resumes_in is None:
            remove(step.product)
        step.product.parent.mkdir(parents=True, exist_ok=True)
        log = self.out / "logs" / f"{step.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        code = self._call(step.command, log)
        if code or not step.product.exists():
            raise StepFailedError(
                f"{step.name} ended with {code}"
                f"{'' if step.product.exists() else f' and without {step.product}'}; see {log}"
            )
        seconds = round(time.monotonic() - start, 1)
        print(f"   {seconds:.0f} s", flush=True)
        write_json(self.marker(step), {"command": shown, "seconds": seconds})

    def _call(self, command: list[str], log: Path) -> int:
        """Run the command and return its status; a signal to this process ends it first."""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        with log.open("a", encoding="utf-8") as file:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
            before = signal.signal(signal.SIGTERM, _exit_on_signal)
            try:
                return child.wait()
            except BaseException:
                child.terminate()  # a training saves its state
                child.wait()
                raise
            finally:
                signal.signal(signal.SIGTERM, before)


def _exit_on_signal(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def difference(before: str, now: str) -> str:
    """The words in which two commands differ, `A, B then, C now`."""
    old, new = shlex.split(before), shlex.split(now)
    gone, added = [w for w in old if w not in new], [w for w in new if w not in old]
    if not gone and not added:
        return "the same arguments in another order"
    return f"{_listed(gone)} then, {_listed(added)} now"


def _listed(words: list[str]) -> str:
    cut = (word if len(word) <= MAX_WORD else f"{word[: MAX_WORD - 3]}..." for word in words)
    return ", ".join(cut) or "nothing"


def lock(out: Path, *, shared: bool) -> TextIO:
    """Lock the directory, with `shared` for several queues at a time.

    Errors: NemoKDError if another process works in it, and either does not share it.
    """
    file = _open(out / "lock")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NemoKDError(
            f"another process runs the experiments in {out}; stop it first, or give another out="
        ) from None
    return file


def locks_of(results: Path) -> Path:
    """Where queues with different `out` claim the runs whose results go to `results`.

    Not below the results, which are committed: in the machine's directory of temporary files.
    """
    name = hashlib.sha256(os.fsencode(results.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"nemo-kd-experiments-{os.getuid()}" / name


def claim(path: Path, *, wait: bool) -> TextIO:
    """Lock a file until it is closed. Errors: BlockingIOError, without `wait`, if it is locked."""
    file = _open(path)
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return file


def _open(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a directory if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
