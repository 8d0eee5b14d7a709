"""A training run that is killed goes on with the very samples, losses and learning rate."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, Script, environment, metrics
from tests.layouts.conftest import LAYOUTS, train_overrides
from tests.layouts.test_refusals import refused

EXACT = ("reduced_train_loss", "sft_loss", "kd_loss", "grad_norm", "lr", "consumed_samples")


def killed_after(step: int, overrides: list[str], processes: int, run: Path) -> None:
    """Start a run, and kill -9 every process of it once it has logged `step`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "examples/train_gpt_sft_kd.py"), *overrides]
    output = run.parent / f"{run.name}-killed.txt"  # NeMo moves what lies in the run's directory
    with output.open("w") as log:
        started = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        limit = time.monotonic() + 240
        while not any(line["step"] == step for line in logged(run)):
            assert started.poll() is None, output.read_text()[-3000:]
            assert time.monotonic() < limit, "the run logs no steps"
            time.sleep(0.01)
        parent = psutil.Process(started.pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
        started.wait()


def logged(run: Path) -> list[dict[str, Any]]:
    """Its whole training steps so far."""
    if not (run / "metrics.jsonl").exists():
        return []
    return [line for line in metrics(run) if "sft_loss" in line]


def validated(run: Path) -> list[tuple[int, float]]:
    """Step and loss of each validation."""
    lines = metrics(run)
    return [(x["step"], x["validation_loss"]) for x in lines if "validation_loss" in x]


def assert_goes_on_exactly(
    script: Script, whole: list[dict[str, Any]], overrides: list[str], processes: int, run: Path
) -> None:
    """The killed run, started again, ends as `whole`, which nobody killed."""
    done = script("train_gpt_sft_kd.py", *overrides, processes=processes)
    (announced,) = re.findall(r"resuming at step (\d+) of (\d+) from (\S+)", done.stderr)
    assert int(announced[0]) >= 3 and int(announced[1]) == len(whole)
    assert Path(announced[2]).parent == run / "checkpoints"
    # One log of the whole run: no step is missing, none is there twice.
    resumed = logged(run)
    assert [line["step"] for line in resumed] == list(range(1, len(whole) + 1))
    assert not list(run.glob("run_*/metrics.jsonl"))
    for line, expected in zip(resumed, whole, strict=True):
        assert {name: line[name] for name in EXACT} == {name: expected[name] for name in EXACT}


@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        ("one", 6),
        # More than an epoch of the store, and several checkpoints.
        pytest.param("tp2", 14, marks=pytest.mark.slow),
        pytest.param("pp2", 14, marks=pytest.mark.slow),
        pytest.param("dp2", 14, marks=pytest.mark.slow),
    ],
)
def test_killed_run_goes_on_exactly(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    script: Script,
    tmp_path: Path,
    layout: str,
    steps: int,
) -> None:
    processes, more = LAYOUTS[layout]
    longer = [f"trainer.max_steps={steps}"] if steps != 6 else []
    overrides = [*train_overrides(tiny, dump(), dump(split="heldout"), tmp_path), *more, *longer]
    whole = logged(train(layout, *longer))
    assert len(whole) == steps
    killed_after(4, overrides, processes, tmp_path)
    assert_goes_on_exactly(script, whole, overrides, processes, tmp_path)
    assert validated(tmp_path) == validated(train(layout, *longer))


@pytest.mark.slow
def test_other_stores_are_refused(
    dump: Callable[..., Path], tiny: Path, script: Script, tmp_path: Path
) -> None:
    overrides = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path)
    killed_after(4, overrides, 1, tmp_path)
    for store in (dump(split="heldout"), f"[{dump()},{dump(split='heldout')}]"):
        message = refused(
            script, "train_gpt_sft_kd.py", *overrides, f"model.data.train_ds.store={store}"
        )
        assert "belongs to a run with other settings: model.data.train_ds.store: " in message
        assert str(dump()) in message and "resume.allow=[model.data.train_ds.store]" in message
