"""Epochs as steps, and when validations and checkpoints are, of the configuration as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.length import (
    check_evaluation,
    check_split_lengths,
    fit_length,
    rows_of,
    samples_of,
)
from nemo_kd.nemo.record import Progress
from nemo_kd.sft import RowError
from tests.conftest import ROOT
from tests.store.samples import sample, spec, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 samples of 4 to 13 tokens."""
    made = spec()
    path = tmp_path_factory.mktemp("length") / "store"
    return write(path, made, [sample(row, made, answers=1 + row) for row in range(10)])


def configuration(directory: Path) -> DictConfig:
    cfg = OmegaConf.load(ROOT / "conf/train_gpt_sft_kd.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.model.data.train_ds.store = str(directory)
    return cfg


def fitted(directory: Path, done: Progress | None = None, **changes: Any) -> DictConfig:
    """`max_steps=7`, `train_ds__drop_last=False`: keys of `trainer`, or of `model.data`."""
    cfg = configuration(directory)
    cfg.model.global_batch_size = 4
    for key, value in changes.items():
        block = "model.data" if "__" in key else "trainer"
        OmegaConf.update(cfg, f"{block}.{key.replace('__', '.')}", value, force_add=True)
    fit_length(cfg, done or Progress())
    return cfg


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": 7, "max_epochs": None}, 7),
        ({"max_steps": 7, "max_epochs": 1}, 2),
        ({"max_steps": 1, "max_epochs": 1}, 1),
        ({"max_steps": -1, "max_epochs": 1}, 2),
        ({"max_steps": -1, "max_epochs": 3}, 6),
        ({"max_steps": -1, "max_epochs": 3, "train_ds__drop_last": False}, 9),
        ({"max_steps": -1, "max_epochs": 1, "train_ds__global_batch_size": 10}, 1),
        # 6 samples of at most 9 tokens
        (
            {
                "max_steps": -1,
                "max_epochs": 2,
                "train_ds__max_seq_length": 9,
                "train_ds__over_long": "drop",
            },
            2,
        ),
        # 85 tokens in packs of 30
        (
            {
                "max_steps": -1,
                "max_epochs": 2,
                "train_ds__max_seq_length": 30,
                "train_ds__packed_sequence": True,
                "train_ds__global_batch_size": 1,
            },
            6,
        ),
    ],
)
def test_the_first_limit_ends_the_run(directory: Path, changes: dict[str, Any], steps: int) -> None:
    trainer = fitted(directory, **changes).trainer
    assert (trainer.max_steps, trainer.max_epochs) == (steps, -1)
    assert trainer.val_check_interval == min(100, steps)


def test_an_epoch_is_a_draw_for_each_sample_of_all_stores_and_files(
    directory: Path, tmp_path: Path
) -> None:
    file = tmp_path / "sft.jsonl"
    file.write_text("{}\n" * 6)
    data: dict[str, Any] = {
        "train_ds__store": [str(directory), str(directory)],
        "train_ds__file_names": [str(file)],
        "train_ds__concat_sampling_probabilities": [0.8, 0.1, 0.1],
    }
    assert fitted(directory, max_steps=-1, max_epochs=1, **data).trainer.max_steps == 26 // 4


@pytest.mark.parametrize(
    ("over_long", "packed", "samples"),
    [("drop", False, 6), ("truncate", False, 8), ("drop", True, 2)],
)
def test_an_epoch_has_the_samples_that_fit_the_students_positions(
    directory: Path, tmp_path: Path, over_long: str, packed: bool, samples: int
) -> None:
    """6 samples, 39 tokens in all, have at most 9 tokens, 8 such answers; packs have 30."""
    config = "position_embedding_type: learned_absolute\nmax_position_embeddings: 9\n"
    (tmp_path / "model_config.yaml").write_text(config)
    cfg = configuration(directory)
    cfg.model.restore_from_path = str(tmp_path)
    train = {"max_seq_length": 30, "over_long": over_long, "packed_sequence": packed}
    cfg.model.data.train_ds = OmegaConf.merge(cfg.model.data.train_ds, train)
    assert samples_of(cfg, "train_ds") == [samples]


def test_a_sample_beyond_the_students_positions_is_not_a_matter_of_the_setting(
    directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "model_config.yaml").write_text("max_position_embeddings: 9\n")
    cfg = configuration(directory)
    cfg.model.restore_from_path = str(tmp_path)
    cfg.model.data.train_ds.over_long = "error"
    with pytest.raises(
        NemoKDError, match=r"the student's limit of 9 tokens.*student with more positions"
    ):
        samples_of(cfg, "train_ds")


@pytest.mark.parametrize(
    ("config", "samples"),
    [
        ("encoder_seq_length: 9\nmax_position_embeddings: ${.encoder_seq_length}", 6),
        *(
            (damaged, 10)
            for damaged in ("", "- a", "a: [1,\n b: }", "max_position_embeddings: ${x}")
        ),
    ],
)
def test_what_cannot_be_read_is_left_to_the_students_own_error(
    directory: Path, tmp_path: Path, config: str, samples: int
) -> None:
    (tmp_path / "model_config.yaml").write_text(config)
    cfg = configuration(directory)
    cfg.model.restore_from_path = str(tmp_path)
    cfg.model.data.train_ds.over_long = "drop"
    cfg.model.data.train_ds.max_seq_length = 30
    assert samples_of(cfg, "train_ds") == [samples]


def test_an_epoch_goes_on_where_another_batch_size_left_it(directory: Path) -> None:
    done = Progress(step=3, consumed_samples=6)  # of 2
    assert fitted(directory, done, max_steps=-1, max_epochs=3).trainer.max_steps == 3 + 24 // 4


@pytest.mark.parametrize(
    ("text", "rows"),
    [("a\nb", 2), ("a\nb\n", 2), ("a\n\nb\n\n\n", 3)],
)
def test_rows_are_lines_but_for_empty_ones_at_the_end(tmp_path: Path, text: str, rows: int) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    assert rows_of(str(file)) == rows


@pytest.mark.parametrize("text", ["", "\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(RowError, match="has no rows"):
        rows_of(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("given", "more", "interval"),
    [
        (3, {}, 3),
        (30, {}, 8),
        (0.25, {}, 2),
        (1.0, {}, 8),
        (None, {}, 8),
        (0.5, {"max_epochs": 3}, 1),  # of the two steps of an epoch
        (0.01, {}, 1),
    ],
)
def test_validations_are_at_most_a_run_apart(
    directory: Path, given: Any, more: dict[str, Any], interval: int
) -> None:
    cfg = fitted(directory, max_steps=8, val_check_interval=given, **more)
    assert cfg.trainer.val_check_interval == interval


@pytest.mark.parametrize("limit", [0, 0.0])
def test_without_validation_checkpoints_follow_the_training_loss(
    directory: Path, limit: float
) -> None:
    none = fitted(directory, max_steps=8, val_check_interval=3)
    off = fitted(
        directory,
        max_steps=8,
        val_check_interval=3,
        limit_val_batches=limit,
        validation_ds__store=str(directory),
    )
    for cfg in (none, off):
        kept = cfg.exp_manager.checkpoint_callback_params
        assert (kept.monitor, kept.every_n_train_steps) == ("reduced_train_loss", 3)
        assert kept.every_n_epochs == 0 and cfg.trainer.limit_val_batches == 0
    on = fitted(directory, max_steps=8, validation_ds__store=str(directory))
    assert on.exp_manager.checkpoint_callback_params.monitor == "validation_loss"
    assert on.trainer.limit_val_batches == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "the run has no end"),
        ({"max_steps": -1, "max_epochs": -1}, "the run has no end"),
        ({"max_steps": 0}, "trainer.max_steps=0: expected at least 1"),
        ({"max_epochs": 0}, "trainer.max_epochs=0 trains nothing"),
        (
            {"max_epochs": 2, "train_ds__global_batch_size": 11},
            "model.global_batch_size=11 is more than the 10 samples",
        ),
        ({"val_check_interval": 0}, "expected a number of steps"),
        ({"val_check_interval": 2.5}, "expected a number of steps"),
        ({"check_val_every_n_epoch": 2}, "trainer.val_check_interval"),
        ({"limit_train_batches": 5}, "trainer.max_steps"),
        ({"fast_dev_run": True}, "save nothing: set trainer.max_steps"),
        ({"max_time": "00:01:00:00"}, "set exp_manager.max_time_per_run"),
        ({"accumulate_grad_batches": 2}, "model.global_batch_size / "),
        (
            {"validation_ds__drop_last": True, "validation_ds__global_batch_size": 11},
            "gives no validation batch: 10 samples",
        ),
        ({"limit_val_batches": 0.1}, "less than one"),
    ],
)
def test_what_would_train_or_validate_nothing_is_refused(
    directory: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(NemoKDError, match=message):
        fitted(directory, validation_ds__store=str(directory), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_ds__drop_last": True}, "gives no validation batch: 10 samples"),
        ({"limit_val_batches": 0}, "trainer.limit_val_batches=0 would measure nothing"),
        ({"limit_val_batches": 0.0}, "trainer.limit_val_batches=0.0 would measure nothing"),
        ({"limit_val_batches": 0.1}, "is less than one"),
        ({"fast_dev_run": True}, "trainer.fast_dev_run"),
    ],
)
def test_an_evaluation_of_nothing_is_refused(
    directory: Path, changes: dict[str, Any], message: str
) -> None:
    cfg = OmegaConf.load(ROOT / "conf/train_gpt_sft_kd.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.model.data.validation_ds.store = str(directory)
    check_evaluation(cfg)
    for key, value in changes.items():
        block = "model.data" if "__" in key else "trainer"
        OmegaConf.update(cfg, f"{block}.{key.replace('__', '.')}", value, force_add=True)
    with pytest.raises(NemoKDError) as caught:
        check_evaluation(cfg)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("warmup", "warned"), [(50, True), (7, True), (6, False), (0, False), (None, False)]
)
def test_a_warm_up_that_outlasts_the_run_is_said(
    directory: Path, capsys: pytest.CaptureFixture[str], warmup: int | None, warned: bool
) -> None:
    cfg = configuration(directory)
    cfg.trainer.max_steps = 7
    cfg.model.optim.sched.warmup_steps = warmup
    fit_length(cfg, Progress())
    said = capsys.readouterr().err
    assert ("of a run of 7 steps: the learning rate reaches at most" in said) is warned


@pytest.mark.parametrize(("steps", "warned"), [(8, True), (7, False), (None, False)])
def test_a_schedule_that_outlasts_the_run_is_said(
    directory: Path, capsys: pytest.CaptureFixture[str], steps: int | None, warned: bool
) -> None:
    cfg = configuration(directory)
    cfg.trainer.max_steps = 7
    cfg.model.kd.alpha, cfg.model.kd.alpha_end, cfg.model.kd.schedule_steps = 0.8, 0.0, steps
    fit_length(cfg, Progress())
    said = capsys.readouterr().err
    assert ("its last step has alpha=0.2, temperature=1, not the schedule" in said) is warned


@pytest.mark.parametrize(
    ("layout", "length", "message"),
    [
        ({"tensor_model_parallel_size": 4}, 110, ""),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 112, ""),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True},
            110,
            "max_seq_length=110 cannot be split into 4 equal parts, as model.sequence_parallel and "
            "model.context_parallel_size do: set 108 or 112",
        ),
        ({"context_parallel_size": 2}, 110, "set 108 or 112"),
        (
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
            },
            7,
            "into 8 equal parts, as model.sequence_parallel and model.context_parallel_size do: "
            "set 8",
        ),
    ],
)
def test_the_longest_sequence_can_be_split(
    directory: Path, layout: dict[str, Any], length: int, message: str
) -> None:
    cfg = OmegaConf.load(ROOT / "conf/train_gpt_sft_kd.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.model.update(layout)
    cfg.model.data.train_ds.store = str(directory)
    cfg.model.data.train_ds.max_seq_length = length
    if not message:
        check_split_lengths(cfg)
        return
    with pytest.raises(NemoKDError) as caught:
        check_split_lengths(cfg)
    assert str(caught.value).endswith(message)


def test_early_stopping_follows_each_validation_and_says_if_there_is_none(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning takes a validation after every step for one at the end of every epoch."""
    cfg = OmegaConf.load(ROOT / "conf/train_gpt_sft_kd.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.exp_manager.create_early_stopping_callback = True
    cfg.trainer.val_check_interval = 1
    cfg.model.data.train_ds.store = cfg.model.data.validation_ds.store = str(directory)
    fit_length(cfg, Progress())
    assert cfg.exp_manager.early_stopping_callback_params.check_on_train_epoch_end is False
    assert "early_stopping" not in capsys.readouterr().err
    cfg.model.data.validation_ds.store = None
    fit_length(cfg, Progress())
    assert "create_early_stopping_callback=true has no effect" in capsys.readouterr().err
