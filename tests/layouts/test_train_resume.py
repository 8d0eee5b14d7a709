"""A training run that is killed goes on with the very samples, losses and learning rate."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.layouts.conftest import LAYOUTS, SIX_STEPS, train_overrides
from tests.processes import TRAIN, error_of, kill, run_script, start_program
from tests.runs import SAME_LINE, metrics, steps

EXACT = ("reduced_train_loss", "sft_loss", "kd_loss", "grad_norm", "lr", "consumed_samples")


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
    """Start a run, and ask it to end once it has logged `step`; it saves its state first."""
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


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_goes_on_exactly(
    whole: list[dict[str, Any]], overrides: list[str], processes: int, run: Path, since: int = 3
) -> None:
    """The killed run, started again at step `since` or a later one, ends as `whole` did."""
    done = run_script("train_gpt_sft_kd.py", *overrides, processes=processes)
    (announced,) = re.findall(r"resuming at step (\d+) of (\d+) from ([^\s,]+)", done.stderr)
    assert int(announced[0]) >= since and int(announced[1]) == len(whole)
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


@pytest.mark.parametrize(
    "step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 4, 5))]
)
def test_a_run_stopped_by_sigterm_goes_on_exactly_and_validates_at_the_same_steps(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
    step: int,
) -> None:
    """As a batch system stops a job, at this step or the next one; validations are after 3 and 6.

    NeMo saves the checkpoint before the validation of its step.
    """
    overrides = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path)
    stop_after(step, overrides, tmp_path)
    whole = train("one")
    assert_goes_on_exactly(steps(whole), overrides, 1, tmp_path, since=step)
    assert validated(tmp_path) == validated(whole)
    last = {name: value for name, value in metrics(whole)[-1].items() if name.startswith("val")}
    assert last.items() <= metrics(tmp_path)[-1].items()
    assert checkpoints(tmp_path) == checkpoints(whole)


def points(run: Path) -> dict[str, set[tuple[int, float]]]:
    """Name → (step, value) of the points that TensorBoard shows, of all starts of a run."""
    events = EventAccumulator(str(run)).Reload()
    return {
        name: {(event.step, event.value) for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
        if "timing" not in name and name != "tokens_per_s"
    }


@pytest.mark.slow
def test_what_is_saved_before_its_validation_is_resumed_and_finished_as_without_a_stop(
    train: Callable[..., Path], dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """NeMo saves at an interval of steps before it validates, and not again after.

    Checkpoints are ranked by a loss of the training, which is not measured before the validation
    with which the run resumes.
    """
    run = tmp_path / "run"
    stores = (dump(), dump(split="heldout"))
    kept = [
        "exp_manager.checkpoint_callback_params.every_n_train_steps=3",
        "exp_manager.checkpoint_callback_params.monitor=reduced_train_loss",
    ]
    overrides = [*train_overrides(tiny, *stores, run), *kept]
    kill_after(4, overrides, 1, run)
    assert [step for step, _ in validated(run)] == [3]
    whole = tmp_path / "whole"
    run_script("train_gpt_sft_kd.py", *train_overrides(tiny, *stores, whole), *kept)
    assert_goes_on_exactly(steps(whole), overrides, 1, run)
    assert validated(run) == validated(whole)
    assert checkpoints(run) == checkpoints(whole)
    assert points(run) == points(whole)
    before = (run / "metrics.jsonl").read_text()
    again = run_script("train_gpt_sft_kd.py", *overrides)
    assert "nothing to train: all 6 steps are done" in again.stderr
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_checkpoint_that_is_saved_in_the_background_is_finished_at_a_stop(
    train: Callable[..., Path], dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    background = "exp_manager.checkpoint_callback_params.async_save=true"
    overrides = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path)
    overrides += [background, "+model.mcore_gpt=true"]  # which NeMo's trainer needs for it
    stop_after(2, overrides, tmp_path)
    whole = train("one")
    assert_goes_on_exactly(steps(whole), overrides, 1, tmp_path, since=2)
    assert validated(tmp_path) == validated(whole)


@pytest.mark.slow
def test_without_a_last_checkpoint_a_run_resumes_from_its_newest(
    train: Callable[..., Path], dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    without = "exp_manager.checkpoint_callback_params.save_last=false"
    overrides = [*train_overrides(tiny, dump(), dump(split="heldout"), tmp_path), without]
    kill_after(4, overrides, 1, tmp_path)
    whole = train("one")
    assert_goes_on_exactly(steps(whole), overrides, 1, tmp_path)
    assert validated(tmp_path) == validated(whole)


def test_a_second_training_in_the_directory_of_one_is_refused(
    dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """And takes nothing from it: the first one goes on, and can be resumed."""
    endless = ["trainer.max_steps=100000", "trainer.val_check_interval=100000"]
    overrides = [*train_overrides(tiny, dump(), dump(split="heldout"), tmp_path), *endless]
    output = tmp_path.with_suffix(".txt")
    with output.open("w") as log:
        first = start_program(TRAIN, *overrides, stdout=log, stderr=log)
        while not has_logged(tmp_path, 1):
            assert first.poll() is None, output.read_text()[-3000:]
            time.sleep(0.1)
        message = error_of("train_gpt_sft_kd.py", *overrides)
        count = len(metrics(tmp_path))
        while len(metrics(tmp_path)) <= count:
            assert first.poll() is None, output.read_text()[-3000:]
            time.sleep(0.1)
        kill(first)
    assert f"{tmp_path}/checkpoints is being written by another job: host " in message
    assert f"process {first.pid}, " in message
    assert not list(tmp_path.glob("run_*"))
    done = run_script("train_gpt_sft_kd.py", *overrides, *SIX_STEPS)
    assert "taking over the lock" in done.stderr and len(steps(tmp_path)) == 6
    assert not (tmp_path / "checkpoints/.lock").exists()


def test_a_run_goes_back_to_the_checkpoint_that_is_given(
    dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """Later steps are trained again, and later checkpoints are out of the way. Once: the same
    command again, as of a job that is queued again, resumes from its own checkpoints."""
    keep = "exp_manager.checkpoint_callback_params.save_top_k=-1"
    overrides = [*train_overrides(tiny, dump(), dump(split="heldout"), tmp_path), keep]
    run_script("train_gpt_sft_kd.py", *overrides)
    before, folder, aside = metrics(tmp_path), checkpoints(tmp_path), "checkpoints-after-step-3"
    (given,) = (tmp_path / "checkpoints").glob("*step=3*")
    back = [*overrides, f"exp_manager.resume_from_checkpoint={given}"]
    back += ["model.kd.alpha=0.5", "resume.allow=[model.kd.alpha]"]
    done = run_script("train_gpt_sft_kd.py", *back)
    assert f"resuming at step 3 of 6 from {given}\n" in done.stderr
    later = sorted(path.name for path in (tmp_path / aside).iterdir())
    assert later == [name for name in folder if "step=6" in name] and len(later) == 2
    assert f"moved 2 checkpoints of steps after 3 to {tmp_path}/{aside}" in done.stderr
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert lines[:4] == before[:4]
    for line, earlier in zip(steps(tmp_path)[3:], before[4:7], strict=True):
        mixed = 0.5 * line["sft_loss"] + 0.5 * line["kd_loss"]
        assert line["loss"] == pytest.approx(mixed, abs=SAME_LINE)
        assert line["loss"] != pytest.approx(earlier["loss"], abs=SAME_LINE)
    (last,) = (tmp_path / "checkpoints").glob("*-last")
    again = run_script("train_gpt_sft_kd.py", *back)
    assert f"an earlier start has resumed from exp_manager.resume_from_checkpoint={given}" in (
        again.stderr
    )
    assert "nothing to train: all 6 steps are done" in again.stderr and last.exists()


@pytest.mark.slow
def test_other_stores_are_refused(dump: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    overrides = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path)
    kill_after(4, overrides, 1, tmp_path)
    for store in (dump(split="heldout"), f"[{dump()},{dump(split='heldout')}]"):
        message = error_of("train_gpt_sft_kd.py", *overrides, f"model.data.train_ds.store={store}")
        assert "belongs to a run with other settings: model.data.train_ds.store: " in message
        assert str(dump()) in message and "resume.allow=[model.data.train_ds.store]" in message
