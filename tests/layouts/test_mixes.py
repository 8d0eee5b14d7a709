"""SFT files beside stores, in training and in validation; weights of their own for stores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.layouts.conftest import FUSED, LAYOUTS, train_overrides
from tests.layouts.test_train_resume import assert_goes_on_exactly, kill_after
from tests.processes import error_of, run_script
from tests.runs import LAYOUT, SAME_LINE, SPLIT, assert_close, metrics, steps, validations

Run = Callable[..., Path]


@pytest.fixture(scope="session")
def mixed(train: Run, tiny: Path) -> Run:
    """The store and the file that it was made of; validated on both of the held-out ones too."""

    def get(layout: str = "one", *more: str) -> Path:
        return train(
            layout,
            f"model.data.train_ds.file_names=[{tiny}/train.jsonl]",
            f"model.data.validation_ds.file_names=[{tiny}/heldout.jsonl]",
            "model.data.validation_ds.names=[heldout,file]",
            *more,
        )

    return get


def test_a_file_is_a_store_of_alpha_0(mixed: Run, train: Run, dump: Run) -> None:
    """Rows without a teacher take their cross-entropy alone, in the same places of the blend."""
    twice = f"model.data.train_ds.store=[{dump()},{dump()}]"
    files, stores = mixed(), train("one", twice, "model.data.train_ds.alpha=[null,0.0]")
    names = ("reduced_train_loss", "grad_norm", "loss", "sft_loss", "calibration_error")
    # The same kernels on the same rows; only sums over the micro-batches of a step may differ.
    assert_close(steps(files), steps(stores), names, abs=1e-6, rel=1e-5)
    for a, every in zip(steps(files), steps(train()), strict=True):
        assert abs(a["loss"] - every["loss"]) > 1e-3


def test_sets_of_a_validation_have_their_own_metrics(mixed: Run) -> None:
    """The same held-out rows as a store and as a file."""
    for line in validations(mixed()):
        for name in ("sft_loss", "top1_label", "calibration_error"):
            of_store, of_file = line[f"val/heldout/{name}"], line[f"val/file/{name}"]
            assert of_store == pytest.approx(of_file, abs=SPLIT), name
        assert "val/heldout/kd_loss" in line and "val/file/kd_loss" not in line
        # The same sum, divided by the same count.
        assert line["val/file/loss"] == pytest.approx(line["val/file/sft_loss"], abs=1e-6)
        # Ten samples in batches of four: the two that fill the last one do not count.
        both = [line[f"val/{name}/loss"] for name in ("heldout", "file")]
        for name in ("validation_loss", "val_loss"):
            assert line[name] == pytest.approx(sum(both) / 2, abs=SAME_LINE)


@pytest.mark.slow
def test_files_alone_say_what_nemos_loss_does_not_read(tiny: Path, train: Run) -> None:
    run = train(
        "one",
        "model.data.train_ds.store=null",
        f"model.data.train_ds.file_names=[{tiny}/train.jsonl]",
        "model.data.train_ds.concat_sampling_probabilities=[1.0]",
        "model.kd.alpha=0",
        "model.kd.fused_lm_head=true",
    )
    said = (run / "stderr.txt").read_text()
    assert "model.kd.fused_lm_head=true has no effect without a store" in said
    assert "padding columns, too, which model.kd.count_padding=false leaves out" in said


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_mixes_on_every_layout(mixed: Run, layout: str) -> None:
    one, other = mixed(), mixed(layout, FUSED)
    names = ("loss", "sft_loss", "kd_loss", "calibration_error")
    assert_close(steps(one), steps(other), names, abs=LAYOUT)


@pytest.mark.slow
def test_a_killed_mix_goes_on_exactly_and_refuses_another_file(
    mixed: Run, dump: Run, tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes((tiny / "train.jsonl").read_bytes())
    overrides = [
        *train_overrides(tiny, dump(), dump(split="heldout"), tmp_path / "run"),
        f"model.data.train_ds.file_names=[{file}]",
    ]
    kill_after(4, overrides, 1, tmp_path / "run")
    assert_goes_on_exactly(steps(mixed()), overrides, 1, tmp_path / "run")
    file.write_text(file.read_text().replace("number", "n", 1))
    longer = [*overrides, "trainer.max_steps=8"]
    message = error_of("train_gpt_sft_kd.py", *longer)
    assert "resume.allow=[model.data.train_ds.store]" in message and str(file) in message


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_a_run_stops_early_and_keeps_the_best_of_a_sets_metric(
    train: Run, dump: Run, tiny: Path, tmp_path: Path, layout: str
) -> None:
    """No improvement is large enough: the second validation is the last."""
    params = "exp_manager.checkpoint_callback_params"
    early = [
        "trainer.max_steps=40",
        "trainer.val_check_interval=2",
        "exp_manager.create_early_stopping_callback=true",
        "exp_manager.early_stopping_callback_params.monitor=val/heldout/kd_loss",
        "exp_manager.early_stopping_callback_params.min_delta=100",
        "exp_manager.early_stopping_callback_params.patience=1",
        f"{params}.monitor=val/heldout/kd_loss",
    ]
    run = train(layout, *early)
    assert [line["step"] for line in steps(run)] == [1, 2, 3, 4]
    assert (
        "stopped early at step 4 of 40: val/heldout/kd_loss did not improve on "
        in (run / "stderr.txt").read_text()
    )
    best = min(validations(run), key=lambda line: line["val/heldout/kd_loss"])
    assert list((run / "checkpoints").glob(f"*-step={best['step']}-*"))
    assert len({line["step"] for line in validations(run)}) == 2
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    processes, overrides = LAYOUTS[layout]
    again = [*train_overrides(tiny, dump(), dump(split="heldout"), copy), *overrides, *early]
    done = run_script("train_gpt_sft_kd.py", *again, processes=processes)
    assert "nothing to train: early stopping ended the run at step 4 of 40" in done.stderr
    assert steps(copy) == steps(run)
    more = ["exp_manager.early_stopping_callback_params.patience=3", "resume.allow=[exp_manager]"]
    done = run_script("train_gpt_sft_kd.py", *again, *more, processes=processes)
    assert "stopped early at step 8 of 40" in done.stderr and "3 validations" in done.stderr
    assert [line["step"] for line in steps(copy)] == list(range(1, 9))


@pytest.mark.slow
def test_early_stopping_is_said_where_the_best_checkpoint_is_restored_at_the_end(
    train: Run,
) -> None:
    """The best by the largest loss, which is that of the first validation."""
    params, stopping = (
        f"exp_manager.{each}_callback_params" for each in ("checkpoint", "early_stopping")
    )
    run = train(
        "one",
        "trainer.max_steps=40",
        "trainer.val_check_interval=2",
        "exp_manager.create_early_stopping_callback=true",
        f"{stopping}.min_delta=100",
        f"{stopping}.patience=1",
        f"{params}.mode=max",
        f"{params}.save_best_model=true",
    )
    assert "stopped early at step 4 of 40: " in (run / "stderr.txt").read_text()
    (best,) = (run / "checkpoints").glob("*-step=2-*")
    assert best.is_dir()


def test_a_monitor_that_does_not_exist_is_refused(tiny: Path, dump: Run, tmp_path: Path) -> None:
    """At the first validation, before a checkpoint: NeMo would train to the end of the run."""
    message = error_of(
        "train_gpt_sft_kd.py",
        *train_overrides(tiny, dump(), dump(split="heldout"), tmp_path),
        "trainer.val_check_interval=1",
        "exp_manager.create_early_stopping_callback=true",
        "exp_manager.early_stopping_callback_params.monitor=val/held/kd_loss",
    )
    assert "early_stopping_callback_params.monitor=val/held/kd_loss is not a metric" in message
    assert "val/heldout/kd_loss, " in message and "val_loss, validation_loss" in message
    assert [line["step"] for line in metrics(tmp_path)] == [1, 1]
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2", "dp2", "pp2"])
def test_generation_metrics_of_stores_and_files(mixed: Run, tiny: Path, layout: str) -> None:
    run = mixed(
        layout,
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "model.data.validation_ds.metric.name=exact_string_match",
        "model.data.validation_ds.tokens_to_generate=6",
        "model.data.validation_ds.max_seq_length=160",
        "model.data.validation_ds.write_predictions_to_file=true",
        "model.data.validation_ds.output_file_path_prefix=${exp_manager.explicit_log_dir}/said",
    )
    (line,) = [line for line in metrics(run) if "val/file/sft_loss" in line]
    scores: dict[str, Any] = {k: v for k, v in line.items() if "exact_string_match" in k}
    assert {"validation_exact_string_match"} < set(scores) and all(
        0 <= v <= 1 for v in scores.values()
    )
    of_set = {}
    for name in ("heldout", "file"):
        (written,) = run.glob(f"said*{name}*.jsonl")
        of_set[name] = [json.loads(text) for text in written.read_text().splitlines()]
        assert len(of_set[name]) == 10
    said = [line["pred"] for line in of_set["heldout"]]
    assert said == [line["pred"] for line in of_set["file"]] and all(said)
    # Prompts as they were asked, whatever was generated in their place.
    rows = [json.loads(text) for text in (tiny / "heldout.jsonl").read_text().splitlines()]
    for line in (line for lines in of_set.values() for line in lines):
        assert "".join(line["input"].split()) in {"".join(row["input"].split()) for row in rows}


@pytest.mark.slow
def test_what_is_generated_may_be_longer_than_the_samples(mixed: Run) -> None:
    """Rouge on a machine without NLTK's sentences, over four pipeline stages, two of them inner."""
    run = mixed(
        "pp4",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "model.data.validation_ds.metric.name=rouge",
        "model.data.validation_ds.tokens_to_generate=90",
    )
    (line,) = [line for line in metrics(run) if "val/file/sft_loss" in line]
    for name in ("heldout_rouge1", "heldout_rougeL", "file_rouge1", "file_rougeL"):
        assert 0 <= line[f"validation_rouge_{name}_fmeasure"] <= 1


@pytest.mark.slow
def test_generation_under_sequence_parallelism_is_refused(
    tiny: Path, dump: Run, tmp_path: Path
) -> None:
    processes, overrides = LAYOUTS["tp2sp"]
    start = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path)
    metric = "model.data.validation_ds.metric.name=exact_string_match"
    done = run_script(
        "train_gpt_sft_kd.py", *start, *overrides, metric, processes=processes, fails=True
    )
    assert "a single token cannot be split over ranks" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.data.train_ds.alpha=[0.5,0.5]", "has 2 entries for 1 stores"),
        pytest.param(
            "model.data.train_ds.alpha=[1.5]", "has 1.5: expected values", marks=pytest.mark.slow
        ),
        pytest.param(
            "model.data.train_ds.alpha=[0.5] model.kd.kd_weight=1",
            "not sft_weight and kd_weight",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "model.data.train_ds.alpha=[0.5] model.kd.alpha_end=0.1",
            "model.kd.alpha_end=0.1 has no effect",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "model.data.validation_ds.names=[a,b]", "does not name the 1", marks=pytest.mark.slow
        ),
    ],
)
def test_settings_of_mixes(
    tiny: Path, dump: Run, tmp_path: Path, override: str, message: str
) -> None:
    start = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path)
    assert message in error_of("train_gpt_sft_kd.py", *start, *override.split())
