"""Milliseconds and peak memory of a step, and whether it makes the host wait for the device."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Row = dict[str, Any]
Step = Callable[[], object]


def reason(error: BaseException) -> str:
    """The error's type and first lines."""
    lines = " ".join(str(error).split())
    return f"{type(error).__name__}: {lines}"[:200]


def timed(make: Callable[[], Mapping[str, Step | str]], shape: str, device: str) -> Iterator[Row]:
    """The median time of each candidate, and its peak memory beyond the inputs.

    A candidate that is a text cannot run for this reason.
    """
    torch.cuda.empty_cache()
    try:
        candidates = make()
    except torch.OutOfMemoryError:
        yield {"shape": shape, "what": "inputs", "not run": "out of memory"}
        return
    for name, step in candidates.items():
        row: Row = {"shape": shape, "what": name}
        try:
            yield row | ({"not run": step} if isinstance(step, str) else measured(step, device))
        except Exception as error:  # one candidate's failure is a result, too
            torch.cuda.empty_cache()
            yield row | {"not run": reason(error)}


def measured(step: Step, device: str) -> Row:
    step()  # compiles
    return {"peak MB": round(peak_bytes(step, device) / 1e6), "ms": milliseconds(step, device)}


def milliseconds(step: Step, device: str) -> float:
    """The median; on a CPU, for tests only, one run's."""
    if device != "cpu":
        from triton.testing import do_bench

        return round(float(do_bench(step, return_mode="median")), 3)
    start = time.perf_counter()
    step()
    return round((time.perf_counter() - start) * 1e3, 3)


def peak_bytes(step: Step, device: str) -> int:
    """Most memory allocated during a step, less what was allocated before; 0 on a CPU."""
    if device == "cpu":
        step()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_waits(step: Step, device: str) -> list[str]:
    """Where the host waits for the device in a step, `file:line` once for each time.

    By `torch.cuda.set_sync_debug_mode`. What the autograd engine runs is reported at the call of
    `backward`. Nothing on a CPU.
    """
    if device == "cpu":
        step()
        return []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{one.filename}:{one.lineno}" for one in found if "synchroniz" in str(one.message).lower()
    ]


def seconds_in_turn(steps: Mapping[str, Step], rounds: int, device: str) -> dict[str, float]:
    """The median seconds of each step; they run in turn, so that the clock favours none."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: sorted(each)[len(each) // 2] for name, each in times.items()}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
