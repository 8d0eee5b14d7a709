"""A step's metrics are its own: nothing of an earlier step stands where nothing was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_kd.mcore.metrics import NAMES
from nemo_kd.store import Sample, Store, StoreWriter
from tests.layouts.conftest import SELDOM
from tests.runs import metrics, steps, validations
from tests.store.samples import each_array

Run = Callable[..., Path]
IN_ORDER = "model.data.train_ds.shuffle=false"
SILENT = {1, 4, 5, 6, 7}
LOSSES = {*NAMES, "reduced_train_loss", "calibration_error"}
KD_METRICS = {"kd_loss", "teacher_mass", "student_mass", "top1_agreement", "student_entropy"}
KD_METRICS |= {"teacher_entropy"}


def without_answer(sample: Sample) -> Sample:
    empty = each_array(sample, lambda rows: rows[:0])
    return dataclasses.replace(empty, loss_mask=np.zeros_like(sample.loss_mask))


@pytest.fixture(scope="module")
def silent(dump: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store, of whose rows 1 and 4 to 7 have no answer token."""
    source = Store(dump())
    writer = StoreWriter(tmp_path_factory.mktemp("silent") / "store", source.spec)
    per_shard = source.spec.rows_per_shard
    for number in range(len(source.manifest.parts)):
        with writer.shard(number) as shard:
            for sample in source:
                if sample.row // per_shard == number:
                    shard.add(without_answer(sample) if sample.row in SILENT else sample)
    writer.finish(len(source.manifest.parts))
    return writer.directory


def curve(run: Path, name: str) -> list[int]:
    """The steps, from 1, at which TensorBoard has a point."""
    events = EventAccumulator(str(run))
    events.Reload()
    return [point.step + 1 for point in events.Scalars(name)]


@pytest.mark.slow
def test_the_file_has_every_step_and_loggers_every_fourth(train: Run) -> None:
    run = train("dp2", SELDOM)
    lines = steps(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in (
        "loss",
        "calibration_error",
        "answer_tokens",
        "tokens_per_s",
        "reduced_train_loss",
    ):
        assert curve(run, name) == [4], name
    # Read back before the validation of step 3, at step 4, before the validation of step 6.
    speeds = [line["tokens_per_s"] for line in lines]
    assert [speeds.index(speed) for speed in speeds] == [0, 0, 0, 3, 4, 4]
    order = [line["step"] for line in metrics(run)]
    assert order == sorted(order)


def check_second_step_is_empty(run: Path) -> None:
    lines = [line for line in metrics(run) if "lr" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["answer_tokens"] > 0 for line in lines] == [True, False, True, True]
    empty = lines.pop(1)
    assert not LOSSES & set(empty)
    assert {"step", "lr", "grad_norm", "consumed_samples"} <= set(empty)
    for line in lines:
        assert set(line) >= LOSSES
        assert all(math.isfinite(line[name]) for name in LOSSES)
    for name in ("loss", "kd_loss", "reduced_train_loss"):
        assert curve(run, name) == [1, 3, 4], name
    assert curve(run, "answer_tokens") == [1, 2, 3, 4]
    assert all("val/heldout/loss" in line for line in validations(run))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "dp2", "pp2", "tp2"])
def test_a_step_without_an_answer_token_has_no_losses(
    train: Run, silent: Path, layout: str
) -> None:
    more = ["trainer.max_steps=4", "trainer.val_check_interval=2", IN_ORDER]
    check_second_step_is_empty(train(layout, f"model.data.train_ds.store={silent}", *more))


def test_a_step_has_what_was_measured_in_it(train: Run, silent: Path, tiny: Path) -> None:
    """One sample a step, by turns of a store and of a file; the third has no answer token."""
    run = train(
        "one",
        f"model.data.train_ds.store={silent}",
        f"model.data.train_ds.file_names=[{tiny}/train.jsonl]",
        "model.data.train_ds.concat_sampling_probabilities=[0.5,0.5]",
        "model.global_batch_size=1",
        IN_ORDER,
    )
    lines = [line for line in metrics(run) if "lr" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [set(line) >= KD_METRICS for line in lines] == [True, False, False, False, True, False]
    assert [line["answer_tokens"] > 0 for line in lines] == [True, True, False, True, True, True]
    for line in lines:
        if line["answer_tokens"]:
            assert {"loss", "sft_loss", "top1_label", "reduced_train_loss"} <= set(line)
            assert "kd_loss" in line or not KD_METRICS & set(line)
        else:
            assert not LOSSES & set(line)
    assert curve(run, "kd_loss") == [1, 5] and curve(run, "answer_tokens") == [1, 2, 3, 4, 5, 6]
    assert curve(run, "loss") == curve(run, "reduced_train_loss") == [1, 2, 4, 5, 6]
