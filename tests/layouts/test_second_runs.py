"""The same command, or nearly the same, in the directory of a run that is over."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_kd.checkpoints.source import open_source
from nemo_kd.nemo.start_of_run import trained_steps
from tests.layouts.conftest import train_overrides
from tests.processes import run_program, run_script
from tests.runs import SAME_LINE, metrics, steps

Cases = dict[str, Any]


@pytest.fixture(scope="module")
def said(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Of `second_runs.py`, on copies of a run of 6 steps."""
    work = tmp_path_factory.mktemp("again")
    overrides = train_overrides(tiny, dump(), dump(split="heldout"), work)
    overrides = [one for one in overrides if "explicit_log_dir" not in one]
    arguments = [train(), work, work / "out.json", *overrides]
    run_program("tests/layouts/second_runs.py", *arguments, fork=True)
    out: dict[str, Any] = json.loads((work / "out.json").read_text())
    return out


@pytest.fixture(scope="module")
def cases(said: dict[str, Any]) -> Cases:
    cases: Cases = said["cases"]
    return cases


def test_no_case_touches_a_file(cases: Cases) -> None:
    assert {name: case["touched"] for name, case in cases.items() if case["touched"]} == {}


@pytest.mark.parametrize("name", ["same", "free", "two_last", "unnamed", "named", "older"])
def test_a_run_that_is_over_says_so(cases: Cases, name: str) -> None:
    case = cases[name]
    assert case["error"] is None
    student = "a.nemo" if name == "named" else "gpt_sft_kd.nemo"
    (line,) = [one for one in case["said"] if "nothing to train" in one]
    assert "all 6 steps are done" in line and f"checkpoints/{student}" in line
    assert "trainer.max_steps" in line and "exp_manager.explicit_log_dir" in line
    assert f"checkpoints/{student}; for transformers: nemo-kd export " in case["said"][-1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stopped_early", "val_loss is nan"),
        ("stopped_earlier", "no improvement in the last 2 validations"),
    ],
)
def test_a_run_that_early_stopping_ended_is_over(cases: Cases, name: str, reason: str) -> None:
    case = cases[name]
    assert case["error"] is None
    (line,) = [one for one in case["said"] if "nothing to train" in one]
    assert f"early stopping ended the run at step 6 of 40 ({reason})" in line
    assert "exp_manager.create_early_stopping_callback=false" in line
    assert "resume.allow=[exp_manager]" in line and "checkpoints/gpt_sft_kd.nemo" in line


def test_other_settings_of_early_stopping_must_be_allowed(cases: Cases) -> None:
    error = cases["more_patience"]["error"]
    assert "early_stopping_callback_params.patience: 10 in the checkpoint, 20 now" in error


def test_a_checkpoint_without_settings_is_not_compared_and_says_so(cases: Cases) -> None:
    assert any("were not compared" in line for line in cases["older"]["said"])
    assert not any("were not compared" in line for line in cases["same"]["said"])


def test_other_settings_are_refused_all_at_once(cases: Cases) -> None:
    error = cases["changed"]["error"]
    for line in (
        "model.kd.alpha: null, the default, in the checkpoint, 0.5 now",
        "model.optim.lr: 0.01 in the checkpoint, 0.005 now",
        "model.global_batch_size: 4 in the checkpoint, 2 now",
        "model.layernorm_epsilon: null in the checkpoint, 0.5 now",  # in no list
    ):
        assert line in error
    assert "train_ds.global_batch_size" not in error  # follows model.global_batch_size
    keys = "model.global_batch_size,model.kd.alpha,model.layernorm_epsilon,model.optim.lr"
    assert f"resume.allow=[{keys}]" in error and "exp_manager.explicit_log_dir" in error


def test_what_is_allowed_is_not_named(cases: Cases) -> None:
    error = cases["partly_allowed"]["error"]
    assert "resume.allow=[model.global_batch_size]" in error
    assert "alpha" not in error and "lr:" not in error


def test_what_a_resume_cannot_honour_is_refused_even_if_allowed(cases: Cases) -> None:
    error = cases["student"]["error"]
    assert "model.restore_from_path" in error and "the weights come from the checkpoint" in error
    assert "resume.allow" not in error


def test_a_misspelt_key_is_not_allowed(cases: Cases) -> None:
    assert "model.optim.lrr" in cases["unknown_allowed"]["error"]
    assert "did you mean model.optim.lr?" in cases["unknown_allowed"]["error"]


def test_an_end_before_the_checkpoint_is_refused(cases: Cases) -> None:
    assert "is at step 6, after the end of a run of 4 steps" in cases["shorter"]["error"]


def test_a_new_run_does_not_mix_with_an_earlier_one(cases: Cases) -> None:
    assert "gpt_sft_kd.nemo exists already" in cases["anew"]["error"]
    assert "-last exists, and exp_manager.resume_if_exists=false" in cases["not_resumed"]["error"]


def test_a_schedule_that_is_no_formula_of_the_step_cannot_be_planned_anew(cases: Cases) -> None:
    error = cases["torch_schedule"]["error"]
    assert "model.optim.sched.name: CosineAnnealing in the checkpoint, ExponentialLR now" in error
    assert "model.optim.sched.name=ExponentialLR has its state in the checkpoint" in error


def test_nemos_order_of_files_without_a_store_depends_on_the_length(cases: Cases) -> None:
    longer = cases["files_longer"]["error"]
    assert "trainer.max_steps: 6 in the checkpoint, 10 now" in longer
    assert "resume.allow=[trainer.max_steps]" in longer
    assert (
        "model.global_batch_size: 4 in the checkpoint, 2 now, and a resumed run cannot change it"
        in (cases["files_other_batch"]["error"])
    )


@pytest.mark.slow
def test_a_longer_run_is_planned_anew_under_what_is_allowed(
    said: dict[str, Any],
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
) -> None:
    """6 steps become 9, the last three with another batch, weight, optimizer: nothing is left
    from the checkpoint's schedule, no sample is left out or seen twice."""
    run = tmp_path / "run"
    shutil.copytree(train(), run)
    rates = said["lr"]
    done = run_script(
        "train_gpt_sft_kd.py",
        *train_overrides(tiny, dump(), dump(split="heldout"), run),
        f"trainer.max_steps={len(rates)}",
        "model.global_batch_size=2",
        "model.optim.lr=0.02",
        "model.optim.weight_decay=0.3",
        "model.optim.betas=[0.8,0.9]",
        "model.kd.alpha=0.25",
        "resume.allow=[model.optim,model.kd.alpha,model.global_batch_size]",
    )
    assert "resuming at step 6 of 9" in done.stderr
    assert "the run now has 9 steps instead of 6" in done.stderr
    assert "model.optim.lr: 0.01 in the checkpoint, 0.02 now" in done.stderr
    lines = steps(run)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["consumed_samples"] for line in lines[6:]] == [26, 28, 30]
    for line, rate in zip(lines[6:], rates[6:], strict=True):
        assert line["lr"] == pytest.approx(rate, rel=1e-6)  # float64, logged as float32
        mixed = 0.75 * line["sft_loss"] + 0.25 * line["kd_loss"]
        assert line["loss"] == pytest.approx(mixed, abs=SAME_LINE)
    assert min(rates[6:]) > 0  # where the schedule of 6 steps has none
    assert [line["step"] for line in metrics(run) if "validation_loss" in line] == [3, 6, 9]
    (last,) = (run / "checkpoints").glob("*-last")  # NeMo refuses to choose between two
    kept = torch.load(last / "common.pt", weights_only=False)
    group = kept["optimizer_states"][0]["param_groups"][0]
    assert (group["weight_decay"], list(group["betas"])) == (0.3, [0.8, 0.9])
    assert kept["nemo_kd"]["settings"]["model"]["optim"]["weight_decay"] == 0.3
    assert kept["nemo_kd"]["consumed_samples"] == 30 and kept["nemo_kd"]["max_steps"] == 9
    assert trained_steps(run / "checkpoints/gpt_sft_kd.nemo") == 9


@pytest.mark.slow
def test_a_student_that_a_kill_prevented_is_written(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
) -> None:
    """The checkpoint of the last step is there, the `.nemo` is not."""
    run = tmp_path / "run"
    shutil.copytree(train(), run)
    student = run / "checkpoints/gpt_sft_kd.nemo"
    student.unlink()
    overrides = train_overrides(tiny, dump(), dump(split="heldout"), run)
    done = run_script("train_gpt_sft_kd.py", *overrides)
    assert f"all 6 steps are done: writing {student}" in done.stderr
    assert trained_steps(student) == 6
    assert "nothing to train" in run_script("train_gpt_sft_kd.py", *overrides).stderr


@pytest.mark.slow
def test_the_best_student_that_a_kill_prevented_is_written(
    dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """The best by `mode=max` is the first, whose loss is the largest."""
    overrides = [
        *train_overrides(tiny, dump(), dump(split="heldout"), tmp_path),
        "trainer.max_steps=3",
        "trainer.val_check_interval=1",
        "exp_manager.checkpoint_callback_params.mode=max",
        "exp_manager.checkpoint_callback_params.save_top_k=1",
        "+exp_manager.checkpoint_callback_params.save_best_model=true",
    ]
    run_script("train_gpt_sft_kd.py", *overrides)
    student, kept = tmp_path / "checkpoints/gpt_sft_kd.nemo", tmp_path / "kept.nemo"
    student.rename(kept)
    run_script("train_gpt_sft_kd.py", *overrides)
    (last,) = (tmp_path / "checkpoints").glob("*-last")
    best, again, latest = (weights(path) for path in (kept, student, last))
    assert all(torch.equal(best[name], again[name]) for name in best)
    assert not all(torch.equal(best[name], latest[name]) for name in best)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.nemo` or of a checkpoint of NeMo, without the optimizer's."""
    found = open_source(path).weights
    assert found is not None
    return {name: found.read(name) for name in found.shapes if name.startswith("model.")}


@pytest.mark.slow
def test_a_time_limit_ends_a_start_and_not_the_run(
    dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    overrides = [
        *train_overrides(tiny, dump(), dump(split="heldout"), tmp_path),
        "trainer.max_steps=100000",
        "trainer.val_check_interval=100000",
        "exp_manager.max_time_per_run=00:00:00:05",
    ]
    steps = []
    for _ in range(2):
        said = run_script("train_gpt_sft_kd.py", *overrides).stderr
        found = re.search("max_time_per_run=00:00:00:05 at step (.*) of 100000: run the same", said)
        assert found, said
        steps.append(int(found[1]))
        assert not (tmp_path / "checkpoints/gpt_sft_kd.nemo").exists()
        assert "the model is" not in said
    assert 0 < steps[0] < steps[1]


def test_a_loss_that_is_nan_ends_the_run(
    dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    overrides = [
        *train_overrides(tiny, dump(), dump(split="heldout"), tmp_path),
        "model.optim.lr=1e30",
        "model.optim.sched.warmup_steps=0",
    ]
    said = run_script("train_gpt_sft_kd.py", *overrides, fails=True, fork=True).stderr
    found = re.search("WARNING: the loss of step ([23]) is nan", said)
    assert found, said
    assert f"the loss is not finite from step {found[1]} on" in said
    assert not (tmp_path / "checkpoints/gpt_sft_kd.nemo").exists()
    assert all(line["lr"] > 0 for line in metrics(tmp_path) if "lr" in line)


def test_an_epoch_ends_the_run_and_checkpoints_are_kept_without_validation(
    dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """10 samples, 5 a step; the validation store is there, but not used."""
    heldout = dump(split="heldout")
    done = run_script(
        "train_gpt_sft_kd.py",
        *train_overrides(tiny, heldout, heldout, tmp_path),
        "trainer.max_epochs=1",
        "trainer.max_steps=12",
        "trainer.val_check_interval=6",
        "trainer.limit_val_batches=0.0",
        "model.global_batch_size=5",
        "model.optim.sched.warmup_steps=0",
    )
    assert "trainer.max_epochs=1: 2 steps" in done.stderr
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["lr"] for line in lines] == pytest.approx([0.01, 0.005])  # half of a cosine of 2
    assert list((tmp_path / "checkpoints").glob("*reduced_train_loss=*step=2*-last"))
    assert (tmp_path / "checkpoints/gpt_sft_kd.nemo").exists()
