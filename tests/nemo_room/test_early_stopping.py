"""Why early stopping ends a run, as Lightning decides it; a monitor that does not exist."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.early_stopping import MonitorCheck, keep_patience, reason_of, stop_reason

pytestmark = pytest.mark.nemo
MONITOR = "val/heldout/kd_loss"


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    "settings",
    [
        {"patience": 1},
        {"patience": 3, "min_delta": 0.2},
        {"patience": 0},
        {"patience": 2, "check_finite": False},
        {"patience": 9, "stopping_threshold": 0.5},
        {"patience": 9, "divergence_threshold": 0.8},
    ],
)
def test_there_is_a_reason_exactly_when_lightning_stops(
    mode: str, settings: dict[str, Any]
) -> None:
    numbers, stops = random.Random(0), 0
    for _ in range(40):
        callback = EarlyStopping(MONITOR, mode=mode, **settings)
        for _ in range(8):
            value = numbers.choice([numbers.random(), numbers.random(), float("nan")])
            stop, _ = callback._evaluate_stopping_criteria(torch.tensor(value))
            reason = reason_of(callback, value)
            assert bool(reason) == stop, (reason, value, callback.state_dict())
            stops += stop
            if stop:
                assert MONITOR in reason
                break
    assert stops


def trainer(**changes: Any) -> Any:
    callback = EarlyStopping(MONITOR, patience=1)
    callback.wait_count = 1
    state = {
        "early_stopping_callbacks": [callback],
        "checkpoint_callbacks": [],
        "callback_metrics": {MONITOR: torch.tensor(1.0), "val_loss": torch.tensor(1.0)},
        "should_stop": True,
        "global_step": 4,
        "max_steps": 40,
        "min_steps": None,
        "log_every_n_steps": 10,
        "sanity_checking": False,
        "state": SimpleNamespace(fn=TrainerFn.FITTING),
    }
    return cast(Any, SimpleNamespace(**(state | changes)))


def test_a_run_that_something_else_ends_has_no_reason() -> None:
    assert stop_reason(trainer()).startswith(MONITOR)
    for changes in ({"should_stop": False}, {"max_steps": 4}, {"min_steps": 5}):
        assert stop_reason(trainer(**changes)) == ""


def test_the_commands_patience_is_kept() -> None:
    run = trainer()
    (callback,) = run.early_stopping_callbacks
    checkpoint = {"callbacks": {callback.state_key: {**callback.state_dict(), "patience": 7}}}
    keep_patience(run, checkpoint)
    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    assert (callback.patience, callback.wait_count) == (1, 1)


@pytest.mark.parametrize("block", ["early_stopping_callback_params", "checkpoint_callback_params"])
def test_a_monitor_that_is_not_logged_is_refused(block: str) -> None:
    if block.startswith("early"):
        run = trainer(early_stopping_callbacks=[EarlyStopping("val/a", strict=False)])
    else:
        run = trainer(checkpoint_callbacks=[ModelCheckpoint(monitor="val/a")])
    with pytest.raises(NemoKDError) as caught:
        MonitorCheck().on_validation_end(run, cast(Any, None))
    assert str(caught.value).startswith(f"exp_manager.{block}.monitor=val/a is not a metric")
    assert str(caught.value).endswith(f"choose one of {MONITOR}, val_loss")


def test_monitors_that_exist_or_are_not_due_or_not_used_are_accepted() -> None:
    check = MonitorCheck()
    check.on_validation_end(trainer(), cast(Any, None))
    accepted: list[dict[str, Any]] = [
        {"early_stopping_callbacks": [EarlyStopping("kd_loss")]},  # logged from step 10
        {"checkpoint_callbacks": [ModelCheckpoint(monitor="val/a", save_top_k=0)]},
        {"callback_metrics": {}},  # seen at an earlier validation
    ]
    for changes in accepted:
        check.on_validation_end(trainer(**changes), cast(Any, None))
    late = trainer(early_stopping_callbacks=[EarlyStopping("kd_los")], global_step=10)
    with pytest.raises(NemoKDError, match="monitor=kd_los is not a metric"):
        check.on_validation_end(late, cast(Any, None))
