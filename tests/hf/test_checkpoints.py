"""Which checkpoint of Trainer is resumed, and where those of later steps go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME

from nemo_kd.data.resumed import FILE
from nemo_kd.errors import NemoKDError
from nemo_kd.hf.checkpoints import checkpoints_in, refuse_without_optimizer
from nemo_kd.loss import KDConfig
from tests.hf.student import write_store
from tests.hf.test_resume import StoreTrainer, trainer_of

OFTEN: dict[str, Any] = {"save_steps": 1, "learning_rate": 0.01}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", [4, 1, 7, 2])


def train(run: Path, store: Path, last: int, checkpoint: Any = None) -> StoreTrainer:
    """Train until step `last`, with a checkpoint after each step."""
    trainer = trainer_of(run, store, KDConfig(), args={**OFTEN, "max_steps": last})
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == last
    return trainer


def names(directory: Path) -> list[str]:
    return [one.name for one in checkpoints_in(directory)]


@pytest.mark.parametrize("cut", ["missing", "truncated"])
def test_the_newest_complete_checkpoint_is_resumed(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str], cut: str
) -> None:
    """With the weights that an uninterrupted training has at its end."""
    wanted = train(tmp_path / "all", store, 4).model.state_dict()
    run = tmp_path / "run"
    train(run, store, 3)
    state = run / "checkpoint-3" / TRAINER_STATE_NAME
    text = state.read_text()
    state.unlink()
    if cut == "truncated":
        state.write_text(text[: len(text) // 2])
    (run / "checkpoint-3" / FILE).unlink()
    message = f"checkpoint-3 was not saved completely .* choose another one in {run}"
    with pytest.raises(NemoKDError, match=message):
        train(run, store, 4, str(run / "checkpoint-3"))
    capsys.readouterr()
    trainer = train(run, store, 4, True)
    line = f"{run}/checkpoint-3 was not saved completely, so {run}/checkpoint-2 is resumed\n"
    assert line in capsys.readouterr().err
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert names(run / "checkpoints-after-step-2") == ["checkpoint-3"]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_without_a_complete_checkpoint_nothing_is_resumed(tmp_path: Path, store: Path) -> None:
    run = tmp_path / "run"
    train(run, store, 1)
    (run / "checkpoint-1" / TRAINER_STATE_NAME).unlink()
    with pytest.raises(NemoKDError, match="has no checkpoint that was saved completely, only ch"):
        train(run, store, 2, True)
    with pytest.raises(NemoKDError, match=r"no checkpoint at .*checkpoint-7"):
        train(run, store, 2, run / "checkpoint-7")
    with pytest.raises(NemoKDError, match="checkpoint-1 is of an earlier training"):
        train(run, store, 2)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["optimizer.pt"], "has no optimizer, so that optimizer and schedule would begin anew"),
        (["scheduler.pt"], "has no schedule, so that optimizer and schedule would begin anew"),
        (["optimizer.pt", "scheduler.pt"], r"has no optimizer and no schedule \(save_only_model"),
    ],
)
def test_a_checkpoint_without_optimizer_or_schedule_is_refused(
    tmp_path: Path, store: Path, missing: list[str], message: str
) -> None:
    """Trainer would begin both anew if one is missing."""
    run = tmp_path / "run"
    train(run, store, 1)
    for name in missing:
        (run / "checkpoint-1" / name).unlink()
    for checkpoint in (True, str(run / "checkpoint-1")):
        with pytest.raises(NemoKDError, match=f"checkpoint-1 {message}"):
            train(run, store, 2, checkpoint)


@pytest.mark.parametrize(
    "files",
    [
        ["optimizer.bin", "scheduler.pt"],
        ["optimizer_0/0.distcp", "scheduler.pt"],
        ["rank0-of-2-optimizer.pt", "scheduler.pt"],
        ["global_step3/mp_rank_00_model_states.pt"],
    ],
)
def test_optimizers_of_deepspeed_and_fsdp_are_known(tmp_path: Path, files: list[str]) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    refuse_without_optimizer(tmp_path)


def test_later_checkpoints_do_not_survive_a_return_to_an_earlier_one(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next start resumes from the checkpoints that the return has saved."""
    run = tmp_path / "run"
    train(run, store, 3)
    old = {one.name: load_file(one / "model.safetensors") for one in checkpoints_in(run)}
    train(run, store, 2, str(run / "checkpoint-1"))
    aside = run / "checkpoints-after-step-1"
    assert f"moved 2 checkpoints of steps after 1 to {aside}\n" in capsys.readouterr().err
    assert (names(run), names(aside)) == (
        ["checkpoint-1", "checkpoint-2"],
        ["checkpoint-2", "checkpoint-3"],
    )
    for name in names(aside):
        found = load_file(aside / name / "model.safetensors")
        assert all(torch.equal(value, found[key]) for key, value in old[name].items())
    assert train(run, store, 4, True)._keeper.resumed == run / "checkpoint-2"
    assert names(run) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    train(run, store, 2, str(run / "checkpoint-1"))
    assert names(run / "checkpoints-after-step-1-2") == [f"checkpoint-{n}" for n in (2, 3, 4)]


def test_a_checkpoint_that_is_refused_moves_nothing(tmp_path: Path, store: Path) -> None:
    run = tmp_path / "run"
    train(run, store, 2)
    other = trainer_of(run, store, KDConfig(alpha=0.5), args={**OFTEN, "max_steps": 3})
    with pytest.raises(NemoKDError, match="belongs to a run with other settings: alpha"):
        other.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert names(run) == ["checkpoint-1", "checkpoint-2"]
