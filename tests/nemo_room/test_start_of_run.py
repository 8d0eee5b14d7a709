"""What is refused or said before a run starts, because a stopped run could not go on as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.end_of_run import SAVE, say_where, written
from nemo_kd.nemo.record import Progress
from nemo_kd.nemo.restored_adapters import PATH
from nemo_kd.nemo.run_directory import METRICS, Back, RunDirectory, keep_metrics
from nemo_kd.nemo.start_of_run import check_manager, dropout_notice, validates_first


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"disable_validation_on_resume": False}, "disable_validation_on_resume=false"),
        (
            {"max_time_per_run": "00:03:30:00", "create_checkpoint_callback": False},
            "max_time_per_run=00:03:30:00 with create_checkpoint_callback=false",
        ),
    ],
)
def test_a_manager_with_which_a_run_cannot_go_on_is_refused(
    given: dict[str, object], named: str
) -> None:
    with pytest.raises(NemoKDError, match=f"exp_manager.{named}"):
        check_manager(OmegaConf.create(given))


def test_other_managers_are_accepted() -> None:
    check_manager(None)
    check_manager(OmegaConf.create({"disable_validation_on_resume": True}))
    check_manager(OmegaConf.create({"max_time_per_run": "00:03:30:00"}))


def test_dropout_is_said_with_its_keys() -> None:
    off = {"hidden_dropout": 0.0, "peft": {"lora_tuning": {"adapter_dropout": 0.0}}}
    assert dropout_notice(OmegaConf.create(off)) == ""
    on = {"attention_dropout": 0.1, "peft": {"lora_tuning": {"adapter_dropout": 0.05}}}
    notice = dropout_notice(OmegaConf.create(on))
    assert notice.startswith(
        "model.attention_dropout=0.1, model.peft.lora_tuning.adapter_dropout=0.05: "
    )


@pytest.mark.parametrize(
    ("done", "first"),
    [
        (Progress(), False),
        (Progress(6, validated=False), True),
        (Progress(6, validated=True), False),
        (Progress(7, validated=False), False),
    ],
)
def test_a_validation_is_missing_where_one_is_due(done: Progress, first: bool) -> None:
    cfg: dict[str, Any] = {
        "trainer": {"val_check_interval": 3, "limit_val_batches": 1.0},
        "model": {"data": {"validation_ds": {"store": ["held-out"]}}},
    }
    assert validates_first(OmegaConf.create(cfg), done) is first
    cfg["trainer"]["limit_val_batches"] = 0
    assert not validates_first(OmegaConf.create(cfg), done)


def test_metrics_are_kept_from_the_newest_start_that_has_them(tmp_path: Path) -> None:
    lines = [
        '{"loss": 3.0, "step": 2}',
        '{"loss": 2.0, "step": 3}',
        '{"validation_loss": 2.5, "step": 3}',
        '{"loss": 1.0, "step": 4}',
        '{"loss": 0.',
    ]
    for run, validated in ((2, True), (3, False)):
        directory = tmp_path / str(run)
        for name in ("run_1", "run_9", "run_10"):  # nothing was moved to the last
            (directory / name).mkdir(parents=True)
        (directory / "run_1" / METRICS).write_text("{}\n")
        (directory / "run_9" / METRICS).write_text("\n".join(lines) + "\n")
        keep_metrics(directory, 3, validated=validated)
        kept = (directory / METRICS).read_text().splitlines()
        assert kept == (lines[:3] if validated else lines[:2])


def test_checkpoints_of_later_steps_are_moved_away_completely_or_again(tmp_path: Path) -> None:
    """Directories, and the files of the ranks of adapters; also after a kill in between."""
    folder, aside = tmp_path / "checkpoints", tmp_path / "checkpoints-after-step-3"
    (folder / "step=3").mkdir(parents=True)
    (folder / "step=6").mkdir()
    for rank in (0, 1):
        (folder / f"mp_rank_0{rank}").mkdir()
        (folder / f"mp_rank_0{rank}/step=6-last.ckpt").touch()
    (tmp_path / f".{aside.name}").mkdir()
    (tmp_path / f".{aside.name}/step=5").mkdir()  # moved before the kill
    Back(3, (folder / "step=6", folder / "step=6-last.ckpt"), aside).move()
    assert {path.relative_to(aside).as_posix() for path in aside.rglob("*step*")} == {
        *("step=5", "step=6", "mp_rank_00/step=6-last.ckpt", "mp_rank_01/step=6-last.ckpt")
    }
    assert [path.name for path in folder.rglob("step*")] == ["step=3"]
    assert not (tmp_path / f".{aside.name}").exists()


CKPT = "a--val_loss=1.5-step=4-last.ckpt"


@pytest.mark.parametrize(
    ("scheme", "file", "said"),
    [
        ("lora", CKPT, f"; {PATH} takes them for an evaluation or a merge. For a .nemo, run the"),
        ("ia3", CKPT, f"; {PATH} takes them for an evaluation. For a .nemo, run the same command"),
        ("lora", f"mp_rank_01/{CKPT}", ". For a .nemo, run the same command with exp_manager."),
    ],
)
def test_a_checkpoint_of_adapters_is_not_said_to_be_exported(
    tmp_path: Path, scheme: str, file: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    callback = SimpleNamespace(last_model_path=str(tmp_path / CKPT), best_model_path="")
    trainer: Any = SimpleNamespace(checkpoint_callback=callback)
    directory = RunDirectory(tmp_path, None, None)
    model = written(trainer, directory)
    cfg = OmegaConf.create({"model": {"peft": {"peft_scheme": scheme}, "restore_from_path": "s"}})
    say_where(cfg, model, directory)
    line = capsys.readouterr().err
    assert line.startswith(f"the adapters ({scheme}) are {tmp_path / CKPT}{said}")
    assert line.endswith(f"{SAVE}=true\n") and "export" not in line
