"""A training run that is killed goes on with the very samples, losses and learning rate."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.layouts.conftest import LAYOUTS, train_overrides
from tests.processes import TRAIN, error_of, kill, run_script, start_program
from tests.runs import metrics, steps

EXACT = ("reduced_train_loss", "sft_loss", "kd_loss", "grad_norm", "lr", "consumed_samples")
STEPS = 6  # of a whole run


def kill_after(step: int, overrides: list[str], processes: int, run: Path) -> None:
    """Start a run, and kill -9 every process of it once it has logged `step`."""
    output = run.parent / f"{run.name}-killed.txt"  # NeMo moves what lies in the run's directory
    with output.open("w") as log:
        started = start_program(TRAIN, *overrides, processes=processes, stdout=log, stderr=log)
        limit = time.monotonic() + 240
        while not has_logged(run, step):
            assert started.poll() is None, output.read_text()[-3000:]
            assert time.monotonic() < limit, "the run logs no steps"
            time.sleep(0.01)
        kill(started)


def stop_after(step: int, overrides: list[str], run: Path) -> None:
    """Start a run, and ask it to end once it has logged `step`; it saves its state first.

    If it is at its last step by then, the run is begun again: there is no validation after that.
    """
    for _ in range(5):
        stop_once(step, overrides, run)
        saved = [path.name for path in (run / "checkpoints").glob("*-last")]
        if not any(f"-step={STEPS}-" in name for name in saved):
            return
        shutil.rmtree(run)
        run.mkdir()
    raise AssertionError(f"five runs have ended before they were asked to after step {step}")


def stop_once(step: int, overrides: list[str], run: Path) -> None:
    output = run.parent / f"{run.name}-stopped.txt"
    with output.open("w") as log:
        started = start_program(TRAIN, *overrides, stdout=log, stderr=log)
        limit = time.monotonic() + 240
        while not has_logged(run, step):
            assert started.poll() is None, output.read_text()[-3000:]
            assert time.monotonic() < limit, "the run logs no steps"
            time.sleep(0.01)
        started.terminate()
        assert started.wait(timeout=120) == 0, output.read_text()[-3000:]


def has_logged(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and step in [line["step"] for line in steps(run)]


def validated(run: Path) -> list[tuple[int, float]]:
    """Step and loss of each validation."""
    lines = metrics(run)
    return [(x["step"], x["validation_loss"]) for x in lines if "validation_loss" in x]


def assert_goes_on_exactly(
    whole: list[dict[str, Any]], overrides: list[str], processes: int, run: Path
) -> None:
    """The killed run, started again, ends as `whole`, which nobody killed."""
    done = run_script("train_gpt_sft_kd.py", *overrides, processes=processes)
    (announced,) = re.findall(r"resuming at step (\d+) of (\d+) from (\S+)", done.stderr)
    assert int(announced[0]) >= 3 and int(announced[1]) == len(whole)
    assert Path(announced[2]).parent == run / "checkpoints"
    # One log of the whole run: no step is missing, none is there twice.
    resumed = steps(run)
    assert [line["step"] for line in resumed] == list(range(1, len(whole) + 1))
    assert not list(run.glob("run_*/metrics.jsonl"))
    for line, expected in zip(resumed, whole, strict=True):
        assert {name: line[name] for name in EXACT} == {name: expected[name] for name in EXACT}


@pytest.mark.parametrize(
    ("layout", "count"),
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
    tmp_path: Path,
    layout: str,
    count: int,
) -> None:
    processes, more = LAYOUTS[layout]
    longer = [f"trainer.max_steps={count}"] if count != 6 else []
    overrides = [*train_overrides(tiny, dump(), dump(split="heldout"), tmp_path), *more, *longer]
    whole = steps(train(layout, *longer))
    assert len(whole) == count
    kill_after(4, overrides, processes, tmp_path)
    assert_goes_on_exactly(whole, overrides, processes, tmp_path)
    assert validated(tmp_path) == validated(train(layout, *longer))


@pytest.mark.slow  # where the signal arrives depends on the machine's speed
@pytest.mark.parametrize("step", [4, 3])
def test_a_run_stopped_by_sigterm_goes_on_exactly_and_validates_at_the_same_steps(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
    step: int,
) -> None:
    """As a batch system stops a job; validations are after steps 3 and 6."""
    overrides = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path)
    stop_after(step, overrides, tmp_path)
    whole = train("one")
    assert_goes_on_exactly(steps(whole), overrides, 1, tmp_path)
    assert validated(tmp_path) == validated(whole)


@pytest.mark.slow
def test_other_stores_are_refused(dump: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    overrides = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path)
    kill_after(4, overrides, 1, tmp_path)
    for store in (dump(split="heldout"), f"[{dump()},{dump(split='heldout')}]"):
        message = error_of("train_gpt_sft_kd.py", *overrides, f"model.data.train_ds.store={store}")
        assert "belongs to a run with other settings: model.data.train_ds.store: " in message
        assert str(dump()) in message and "resume.allow=[model.data.train_ds.store]" in message
