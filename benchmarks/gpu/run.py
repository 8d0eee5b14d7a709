"""Check and time everything that one GPU can show: `make gpu`.

    python3 -m benchmarks.gpu.run            # gpu.json and gpu.md in $OUT, or in outputs/gpu
    python3 -m benchmarks.gpu.run loss head  # these parts only

Needs CUDA and a Python with torch, Triton, numpy and pytest. Parts are processes of their own, with
a limit of seconds each; all together end after `SECONDS`. Each result is written as soon as it
exists; what cannot run is listed with the reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, ROW

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "triton", "numpy", "pytest")
SECONDS = 580
ALL, REST = "all", "the rest"
"""Names of what a part did not run, when it ended early."""
Row = dict[str, Any]


def missing() -> str | None:
    """What this machine lacks, or None."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} in {sys.executable}"
    import torch

    return None if torch.cuda.is_available() else "a GPU that torch can use (CUDA)"


def rows_of(name: str, seconds: float, log: Path, tiny: bool = False) -> Iterator[Row]:
    """Run a part; yield its results as they come. Other output goes to `log`."""
    command = [sys.executable, "-m", "benchmarks.gpu.parts", name, *(["tiny"] if tiny else [])]
    with log.open("w", encoding="utf-8") as errors:
        part = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # with the processes that it starts
        )
        timer = threading.Timer(seconds, kill, [part])
        timer.start()
        what = ALL
        try:
            assert part.stdout is not None
            for line in part.stdout:
                if line.startswith(ROW):
                    yield json.loads(line.removeprefix(ROW))
                    what = REST
            code = part.wait()
        finally:
            timer.cancel()
            kill(part)
    if code == -signal.SIGKILL:
        yield {"what": what, "not run": f"no time: stopped after {seconds:.0f} s"}
    elif code:
        last = (
            log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            or [f"exit code {code}"]
        )[-1]
        yield {"what": what, "not run": last[:300]}


def kill(part: subprocess.Popen[str]) -> None:
    """Kill a part and the processes that it started; nothing if none is left."""
    with suppress(ProcessLookupError):
        os.killpg(part.pid, signal.SIGKILL)


def as_markdown(result: dict[str, Any]) -> str:
    lines = []
    for part, rows in result["parts"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {part}", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        cells = [
            [str(row.get(column, "")).replace("|", "\\|") for column in columns] for row in rows
        ]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines[1:]) + "\n"


def write(result: dict[str, Any], out: Path) -> None:
    (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(as_markdown(result), encoding="utf-8")


def failed(parts: dict[str, list[Row]]) -> list[str]:
    """The names of checks that failed; `correct` if it did not end."""
    rows = [row for part in parts.values() for row in part]
    names = [row["what"] for row in rows if str(row.get("result", "")).startswith("failed")]
    ended = not {row["what"] for row in parts.get("correct", [])} & {ALL, REST}
    return names if ended else ["correct", *names]


def main(arguments: list[str]) -> None:
    tiny = arguments[:1] == ["tiny"]
    names = arguments[tiny:] or list(PARTS)
    lacking = missing() if not tiny else None
    if lacking:
        sys.exit(f"error: make gpu needs {lacking}; see docs/gpu.md")
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"error: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    out = Path(os.environ.get("OUT") or ROOT / "outputs/gpu")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + SECONDS
    names = ["machine", *(name for name in names if name != "machine")]
    result: dict[str, Any] = {"parts": {name: [] for name in names}}
    for name in names:
        seconds = min(PARTS[name][0], end - time.monotonic())
        rows = result["parts"][name]
        for row in rows_of(name, max(seconds, 0), out / f"{name}.log", tiny):
            rows.append(row)
            print(name, row, flush=True)
            write(result, out)
    print(f"written: {out}/gpu.json, {out}/gpu.md")
    if wrong := failed(result["parts"]):
        sys.exit(f"error: failed on this GPU: {', '.join(wrong)}")


if __name__ == "__main__":
    main(sys.argv[1:])
