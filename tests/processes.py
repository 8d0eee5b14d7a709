"""The repository's programs as processes: run to their end, started, refused or killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).parent.parent
TRAIN, DUMP = "examples/train_gpt_sft_kd.py", "examples/dump_teacher_topk.py"


def command(program: str | Path, *arguments: object, processes: int = 1) -> list[str]:
    """python PROGRAM, a path in the repository; under torchrun for more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / program), *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """One thread per process, this checkout's modules, tracebacks; then `variables`."""
    paths = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
    for name, first in paths.items():
        paths[name] = os.pathsep.join(part for part in (first, os.environ.get(name)) if part)
    return {**os.environ, **paths, "OMP_NUM_THREADS": "1", "NEMO_KD_TRACEBACK": "1", **variables}


def run_program(
    program: str | Path,
    *arguments: object,
    processes: int = 1,
    fails: bool = False,
    cwd: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run `command(…)`; raise its output unless it succeeds or, with `fails`, fails."""
    done = subprocess.run(
        command(program, *arguments, processes=processes),
        env=environment(**variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if (done.returncode != 0) != fails:
        raise AssertionError(done.stdout[-4000:] + done.stderr[-8000:])
    return done


def run_script(
    name: str, *overrides: str, processes: int = 1, fails: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `examples/NAME`."""
    program = f"examples/{name}"
    return run_program(program, *overrides, processes=processes, fails=fails, cwd=None, **variables)


def error_of(name: str, *overrides: str) -> str:
    """The one error line of `examples/NAME`, which must be the last that it prints."""
    done = run_script(name, *overrides, fails=True, NEMO_KD_TRACEBACK="")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.strip().endswith(line)
    assert "Traceback" not in done.stderr and "Error executing job" not in done.stderr
    return line


def start_program(
    program: str | Path,
    *arguments: object,
    processes: int = 1,
    stdout: int | IO[str] = subprocess.PIPE,
    stderr: int | IO[str] = subprocess.PIPE,
    **variables: str,
) -> subprocess.Popen[str]:
    """Start `command(…)` and return at once."""
    started = command(program, *arguments, processes=processes)
    return subprocess.Popen(
        started, env=environment(**variables), stdout=stdout, stderr=stderr, text=True
    )


def kill(process: subprocess.Popen[str]) -> None:
    """Kill -9 a process and its descendants: torchrun's ranks have sessions of their own."""
    parent = psutil.Process(process.pid)
    for one in [*parent.children(recursive=True), parent]:
        one.kill()
    process.communicate()
