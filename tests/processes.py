"""The repository's programs as processes: run to their end, started, refused or killed."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import psutil

ROOT = Path(__file__).parent.parent
Done = subprocess.CompletedProcess[str]
TIMEOUT = 600  # seconds
TRAIN, DUMP = "examples/train_gpt_sft_kd.py", "examples/dump_teacher_topk.py"


def command(
    program: str | Path, *arguments: object, processes: int = 1, python: str = sys.executable
) -> list[str]:
    """python PROGRAM, a path in the repository; under torchrun for more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    return [python, *launcher, str(ROOT / program), *map(str, arguments)]


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
    fork: bool = False,
    python: str = sys.executable,
    **variables: str,
) -> Done:
    """Run `command(…)`; raise its output unless it succeeds or, with `fails`, fails.

    `fork`: run it in a fork of a process that has imported NeMo (`tests/forks.py`).
    """
    if fork:
        job = {"processes": processes, "cwd": str(cwd or Path.cwd())}
        words = [str(ROOT / program), *map(str, arguments)]
        done = _run_in_a_fork(words, {**job, "environment": environment(**variables)})
    else:
        done = subprocess.run(
            command(program, *arguments, processes=processes, python=python),
            env=environment(**variables),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    if (done.returncode != 0) != fails:
        raise AssertionError(done.stdout[-4000:] + done.stderr[-8000:])
    return done


def _run_in_a_fork(words: list[str], job: dict[str, object]) -> Done:
    server = _forks()
    assert server.stdin and server.stdout
    with TemporaryDirectory() as directory:
        stdout, stderr = Path(directory, "stdout"), Path(directory, "stderr")
        stdout.touch()
        stderr.touch()
        job = {**job, "program": words[0], "arguments": words[1:]}
        job |= {"stdout": str(stdout), "stderr": str(stderr)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], TIMEOUT)[0]:
            kill(server)
            _forks.cache_clear()
            raise subprocess.TimeoutExpired(words, TIMEOUT, stdout.read_bytes())
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, status, stdout.read_text(), stderr.read_text())


@cache
def _forks() -> subprocess.Popen[str]:
    """The server `tests/forks.py`, one for each process of pytest, which it ends with."""
    pipe = subprocess.PIPE
    variables = environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # as the scripts
    return subprocess.Popen(
        command("tests/forks.py"), env=variables, stdin=pipe, stdout=pipe, text=True
    )


def run_script(
    name: str,
    *overrides: str,
    processes: int = 1,
    fails: bool = False,
    fork: bool = True,
    **variables: str,
) -> Done:
    """Run `examples/NAME`; not in a fork if `variables` could change what it imports."""
    fork = fork and not variables.keys() - {"NEMO_KD_TRACEBACK"}
    options = {"processes": processes, "fails": fails, "fork": fork, **variables}
    return run_program(f"examples/{name}", *overrides, **options)  # type: ignore[arg-type]


def error_of(name: str, *overrides: str, **variables: Any) -> str:
    """The one error line of `examples/NAME`, which must be the last that it prints."""
    done = run_script(name, *overrides, fails=True, NEMO_KD_TRACEBACK="", **variables)
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
