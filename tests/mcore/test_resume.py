"""A resume compares data and loss with those of the checkpoints in the directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.checkpoints.latest import LATEST
from nemo_kd.data.resumed import FILE
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, KDSchedule
from nemo_kd.mcore import KDDataset, Source
from nemo_kd.mcore.resume import keep_settings
from nemo_kd.store import Store
from tests.store.samples import sample, spec, write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(write(tmp_path / "store", spec(), [sample(i, spec(), 3) for i in range(4)]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory that a training saves to and resumes from."""
    return tmp_path / "run"


def start(
    run: Path,
    store: Store,
    *alphas: float | None,
    load: bool = True,
    config: KDConfig | None = None,
    **more: Any,
) -> None:
    """A start of a training that ends before it saves."""
    data = KDDataset([Source(store, alpha) for alpha in alphas], seq_length=127)
    keep_settings(data, config or KDConfig(), save=run, load=run if load else None, **more)


def keep(run: Path, *args: Any, **more: Any) -> None:
    """A start, and a checkpoint ten iterations later."""
    start(run, *args, **more)
    latest = run / LATEST
    latest.write_text(str(int(latest.read_text()) + 10 if latest.is_file() else 10))


def test_another_alpha_of_a_store_is_refused_by_name(run: Path, store: Store) -> None:
    keep(run, store, 0.8, None, load=False)
    keep(run, store, 0.8, None)
    for alphas in ((0.1, None), (0.8, 0.9), (None, None)):
        with pytest.raises(NemoKDError, match=r"other settings: store_alpha: \[0.8, None\] in the"):
            keep(run, store, *alphas)
    keep(run, store, 0.1, None, allow=["store_alpha"])
    keep(run, store, 0.1, None)


def test_a_store_that_had_the_alpha_of_the_training_keeps_it(run: Path, store: Store) -> None:
    keep(run, store, None, load=False)
    keep(run, store, None)
    with pytest.raises(NemoKDError, match=r"store_alpha: None in the checkpoint, \[0.1\] now"):
        keep(run, store, 0.1)


def test_a_file_of_an_earlier_version_is_resumed(
    run: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no alpha of the stores."""
    keep(run, store, 0.8, load=False)
    written = json.loads((run / FILE).read_text())
    del written["store_alpha"]
    (run / FILE).write_text(json.dumps(written))
    keep(run, store, 0.1)
    assert "has no store_alpha, so it was not compared" in capsys.readouterr().out
    keep(run, store, 0.1)
    assert not capsys.readouterr().out


def student(name: str, fingerprint: str) -> dict[str, Any]:
    return {"more": {"student": {"path": name, "fingerprint": fingerprint}}}


def test_another_student_is_refused_and_a_moved_one_is_continued(run: Path, store: Store) -> None:
    keep(run, store, None, load=False, **student("a", "0" * 64))
    keep(run, store, None, **student("moved", "0" * 64))
    message = r"student: moved \(fingerprint 0{12}\) in the checkpoint, b \(fingerprint 1{12}\) now"
    with pytest.raises(NemoKDError, match=message):
        keep(run, store, None, **student("b", "1" * 64))
    keep(run, store, None, allow=["student"], **student("b", "1" * 64))


def test_a_file_without_a_student_is_resumed(
    run: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(run, store, None, load=False)
    keep(run, store, None, **student("a", "0" * 64))
    assert "has no student, so it was not compared" in capsys.readouterr().out


SPELT: list[dict[str, Any]] = [{}, {"alpha": 0.9}, {"sft_weight": 0.1, "kd_weight": 0.9}]


@pytest.mark.parametrize("then", SPELT)
@pytest.mark.parametrize("now", SPELT)
def test_the_same_weights_spelt_differently_are_resumed(
    run: Path, store: Store, then: dict[str, Any], now: dict[str, Any]
) -> None:
    keep(run, store, None, load=False, config=KDConfig(**then))
    keep(run, store, None, config=KDConfig(**now))


def test_other_weights_are_refused_in_every_spelling(run: Path, store: Store) -> None:
    keep(run, store, None, load=False)
    with pytest.raises(NemoKDError, match=r"settings: alpha: None in the checkpoint, 0.5 now. R"):
        keep(run, store, None, config=KDConfig(alpha=0.5))
    message = r"settings: kd_weight: None in the checkpoint, 0.9 now; sft_weight: None in .*, 0.2 n"
    with pytest.raises(NemoKDError, match=message):
        keep(run, store, None, config=KDConfig(sft_weight=0.2, kd_weight=0.9))


@pytest.mark.parametrize(
    ("config", "effect"),
    [
        (KDConfig(), ""),
        (KDSchedule(alpha_end=0.1, schedule_steps=5), ""),
        (KDSchedule(alpha_end=0.1), ": the loss's schedule (alpha_end=0.1) may jump to that of 30"),
    ],
)
def test_another_number_of_steps_is_said_with_the_schedule_that_follows_it(
    run: Path, store: Store, capsys: pytest.CaptureFixture[str], config: KDConfig, effect: str
) -> None:
    keep(run, store, None, load=False, config=config)
    keep(run, store, None, config=config, steps=20)  # of an earlier version: no number is known
    keep(run, store, None, config=config, steps=20)
    assert not capsys.readouterr().out
    keep(run, store, None, config=config, steps=30)
    line = f"{run} is of a run of 20 steps, and this one has 30{effect}"
    assert capsys.readouterr().out == line + (" steps\n" if effect else "\n")
    keep(run, store, None, config=config, steps=30)
    assert not capsys.readouterr().out


def test_settings_of_a_start_that_saved_nothing_do_not_count(run: Path, store: Store) -> None:
    """Those of the checkpoint do, until another one exists."""
    keep(run, store, None, config=KDConfig(alpha=0.9))
    changed: dict[str, Any] = {"config": KDConfig(alpha=0.1)}
    for _ in range(2):
        start(run, store, None, **changed, allow=["alpha"])
    start(run, store, None, config=KDConfig(alpha=0.9))
    with pytest.raises(NemoKDError, match=r"settings: alpha: 0.9 in the checkpoint, 0.1 now"):
        start(run, store, None, **changed)
    keep(run, store, None, **changed, allow=["alpha"])
    start(run, store, None, **changed)
    with pytest.raises(NemoKDError, match=r"settings: alpha: 0.1 in the checkpoint, 0.9 now"):
        start(run, store, None, config=KDConfig(alpha=0.9))


def test_a_start_among_checkpoints_that_it_does_not_load_is_refused(
    run: Path, store: Store, tmp_path: Path
) -> None:
    """As with --finetune, or without --load: they would count as this training's."""
    start(run, store, None, load=False)
    start(run, store, 0.5, load=False)  # nothing is there
    keep(run, store, None, load=False)
    kept = (run / FILE).read_text()
    message = f"{run} has iteration 10 of an earlier training, which this start does not continue"
    data = KDDataset(store, seq_length=127)
    for load in (None, tmp_path / "nothing", elsewhere(tmp_path, store)):
        with pytest.raises(NemoKDError, match=message):
            keep_settings(data, KDConfig(), save=run, load=load)
    assert (run / FILE).read_text() == kept
    keep_settings(data, KDConfig(), save=tmp_path / "new", load=run)
    keep_settings(data, KDConfig(), save=None, load=run)
    (run / LATEST).write_text("release")  # weights to start from
    keep_settings(data, KDConfig(), save=run, load=None)


def elsewhere(directory: Path, store: Store) -> Path:
    keep(directory / "elsewhere", store, None, load=False)
    return directory / "elsewhere"


def test_a_checkpoint_without_the_file_stays_unknown_until_the_first_save(
    run: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run.mkdir()
    (run / LATEST).write_text("10")
    start(run, store, None)
    assert f"{run} has no {FILE}, so data and loss were not" in capsys.readouterr().out
    keep(run, store, 0.5)
    assert f"has no settings of iteration 10 in {FILE}, so data" in capsys.readouterr().out
    with pytest.raises(NemoKDError, match=r"store_alpha: \[0.5\] in the checkpoint, None now"):
        start(run, store, None)
