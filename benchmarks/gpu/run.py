"""Check and time the loss, the fused head and the top-K on one GPU: `make gpu`.

    python3 -m benchmarks.gpu.run       # gpu.json and gpu.md in $OUT, or in outputs/gpu

Needs CUDA and a Python with torch, Triton, numpy and pytest. Each result is written as soon as it
exists; a part that cannot run is listed with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "triton", "numpy", "pytest")
LOSSES = [(n, v) for v in (49_152, 128_256, 151_936, 262_144) for n in (4096, 8192, 32_768)]
HEADS = ((8192, 49_152, 576), (8192, 128_256, 4096))
TOPKS = ((8192, 49_152), (8192, 128_256))
Row = dict[str, Any]


def missing() -> str | None:
    """What this machine lacks, or None."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} in {sys.executable}"
    import torch

    return None if torch.cuda.is_available() else "a GPU that torch can use (CUDA)"


def correct() -> Iterator[Row]:
    """The checks against float64, each in a process of its own."""
    checks = [sys.executable, "-m", "benchmarks.gpu.checks", "cuda"]
    yield {"what": "against float64 and plain torch", **outcome(checks)}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        yield {"what": "compute-sanitizer", "not run": "compute-sanitizer is not on PATH"}
    else:
        command = [sanitizer, "--error-exitcode", "3", *checks, "small"]
        yield {"what": "compute-sanitizer, small case", **outcome(command)}


def outcome(command: list[str]) -> Row:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    except subprocess.TimeoutExpired:
        return {"result": "failed: no end after 200 s"}
    lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).splitlines()
    text = "; ".join(lines) if done.returncode == 0 else "failed: " + " ".join(lines[-3:])
    return {"result": text}


def loss() -> Iterator[Row]:
    from benchmarks.gpu.candidates import losses
    from benchmarks.gpu.predict import loss_bytes

    bandwidth = copy_bandwidth()
    yield {"what": "copy of 1 GiB", "TB/s": round(bandwidth / 1e12, 2)}
    for n, v in LOSSES:
        for row in timed(lambda n=n, v=v: losses(n, v, "cuda"), f"({n:,}, {v:,})"):
            if row["what"].startswith("ours") and "plain" not in row["what"] and "ms" in row:
                moved = n * loss_bytes(v)
                row["of the copy's bandwidth"] = round(moved / row["ms"] * 1e3 / bandwidth, 2)
            yield row


def head() -> Iterator[Row]:
    from benchmarks.gpu.candidates import heads

    for n, v, h in HEADS:
        yield from timed(lambda n=n, v=v, h=h: heads(n, v, h, "cuda"), f"({n:,}, {v:,}, {h:,})")


def topk() -> Iterator[Row]:
    from benchmarks.gpu.candidates import topks

    for n, v in TOPKS:
        yield from timed(lambda n=n, v=v: topks(n, v, "cuda"), f"({n:,}, {v:,})")


def timed(make: Callable[[], dict[str, Any]], shape: str) -> Iterator[Row]:
    """The median time of each candidate, and its peak memory beyond the inputs."""
    import torch
    from triton.testing import do_bench

    torch.cuda.empty_cache()
    try:
        candidates = make()
    except torch.OutOfMemoryError:
        yield {"shape": shape, "what": "inputs", "not run": "out of memory"}
        return
    for name, step in candidates.items():
        row: Row = {"shape": shape, "what": name}
        try:
            yield row | ({"not run": step} if isinstance(step, str) else measured(step, do_bench))
        except Exception as error:  # one candidate's failure is a result, too
            torch.cuda.empty_cache()
            yield row | {"not run": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def measured(step: Callable[[], object], do_bench: Callable[..., Any]) -> Row:
    import torch

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return {"ms": round(do_bench(step, return_mode="median"), 3), "peak MB": round(peak)}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    import torch
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * (1 << 30) / (do_bench(lambda: target.copy_(source), return_mode="median") / 1e3)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "correct": correct,
    "loss": loss,
    "head": head,
    "topk": topk,
}


def machine() -> Row:
    import torch
    import triton

    versions = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "triton": triton.__version__,
    }
    return {"GPU": torch.cuda.get_device_name(), **versions, "python": sys.version.split()[0]}


def as_markdown(result: dict[str, Any]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in result["machine"].items())]
    for part, rows in result["parts"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {part}", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], out: Path) -> None:
    (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "gpu.md").write_text(as_markdown(result))


def main() -> None:
    lacking = missing()
    if lacking:
        sys.exit(f"error: make gpu needs {lacking}; see docs/gpu.md")
    out = Path(os.environ.get("OUT") or ROOT / "outputs/gpu")
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "parts": {}}
    for name, part in PARTS.items():
        rows = result["parts"].setdefault(name, [])
        try:
            for row in part():
                rows.append(row)
                print(name, row, flush=True)
                write(result, out)
        except Exception as error:
            rows.append({"what": name, "not run": f"{type(error).__name__}: {error}"[:300]})
            write(result, out)
    print(f"written: {out}/gpu.json, {out}/gpu.md")
    if any(str(row.get("result", "")).startswith("failed") for row in result["parts"]["correct"]):
        sys.exit("error: the loss is wrong on this GPU: see the part `correct`")


if __name__ == "__main__":
    main()
