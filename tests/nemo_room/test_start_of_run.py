"""What is refused or said before a run starts, because a stopped run could not go on as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.record import Progress
from nemo_kd.nemo.run_directory import METRICS, keep_metrics
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
