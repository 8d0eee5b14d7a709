"""Training: the same losses on every layout, NeMo's own without a KD term."""

from __future__ import annotations

import json
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemo_kd.loss import KDConfig
from nemo_kd.store import Store
from tests.distribution.blocks import run_nemo_kd
from tests.layouts.conftest import FUSED, SELDOM, train_overrides
from tests.processes import run_program, run_script
from tests.runs import LAYOUT, SAME_LINE, SPLIT, assert_close, steps, validations

STEP_METRICS = (
    "loss",
    "sft_loss",
    "kd_loss",
    "teacher_mass",
    "student_mass",
    "top1_agreement",
    "tokens_per_s",
)
SPLIT_METRICS = ("reduced_train_loss", "grad_norm", "sft_loss", "kd_loss")


def test_every_step_logs_all_metrics(train: Callable[..., Path]) -> None:
    lines = steps(train())
    sft, kd = KDConfig().weights
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(STEP_METRICS) <= set(line)
        assert line["loss"] == pytest.approx(sft * line["sft_loss"] + kd * line["kd_loss"])
        assert 0 < line["teacher_mass"] < 1 and 0 < line["student_mass"] < 1


def last_line(text: str) -> tuple[str, list[str]]:
    """Path of the model, and the words of the command that exports it."""
    said = re.fullmatch(r"the model is (.+); for transformers: (.+)", text.splitlines()[-1])
    assert said, text
    return said[1], shlex.split(said[2])


def test_the_last_line_names_the_model_and_the_command_that_exports_it(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    run = train()
    model, command = last_line((run / "stderr.txt").read_text())
    assert model == f"{run}/checkpoints/gpt_sft_kd.nemo" and Path(model).exists()
    assert command == ["nemo-kd", "export", model, f"{run}/hf"]
    run_nemo_kd(["export", model, str(tmp_path / "hf"), "--no-verify"])
    assert (tmp_path / "hf/model.safetensors").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert list(tokenizer("a")) == ["input_ids", "attention_mask"]  # what a decoder takes


@pytest.mark.slow
def test_without_a_nemo_file_the_last_line_names_the_checkpoint_or_that_there_is_none(
    tiny: Path, dump: Callable[..., Path], tmp_path: Path
) -> None:
    base = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path / "run")
    base += ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    no_file = "+exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false"
    model, command = last_line(run_script("train_gpt_sft_kd.py", *base, no_file).stderr)
    assert Path(model).is_dir() and Path(model).name.endswith("step=2-consumed_samples=8.0-last")
    assert command == ["nemo-kd", "export", model, f"{tmp_path}/run/hf"]
    nothing = run_script("train_gpt_sft_kd.py", *base, "exp_manager=null").stderr
    assert nothing.splitlines()[-1].startswith("no model was written")


def test_training_lowers_both_losses_on_held_out_data(train: Callable[..., Path]) -> None:
    first, last = validations(train("one", "+model.kd.alpha=0.9"))
    assert last["val/heldout/sft_loss"] < first["val/heldout/sft_loss"]
    assert last["val/heldout/kd_loss"] < first["val/heldout/kd_loss"]
    assert 0 < last["val/heldout/calibration_error"] < 1


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp2", [SELDOM]),
        ("dp2dist", []),
        pytest.param("tp2pp2", [], marks=pytest.mark.slow),
        pytest.param("tp2", [], marks=pytest.mark.slow),
        ("pp2", []),
        pytest.param("one", [FUSED], marks=pytest.mark.slow),
        ("tp2sp", [FUSED]),
        pytest.param("pp2", [FUSED], marks=pytest.mark.slow),
        pytest.param("tp4", [], marks=pytest.mark.slow),
    ],
)
def test_layouts_and_fused_lm_head_agree(
    train: Callable[..., Path], layout: str, options: list[str]
) -> None:
    one, other = train(), train(layout, *options)
    assert_close(steps(one), steps(other), STEP_METRICS[:-1], abs=LAYOUT)
    names = [name for name in validations(one)[0] if name.startswith("val/")]
    assert_close(validations(one), validations(other), names, abs=LAYOUT)


def test_alpha_zero_is_nemos_own_sft_bit_for_bit(
    train: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """NeMo's own class, on the JSONL; ours with alpha 0, on the store."""
    ours = steps(train("one", "+model.kd.alpha=0", "++model.kd.count_padding=true"))
    run_program("tests/layouts/nemo_sft.py", tiny, tmp_path, fork=True)
    nemo = json.loads((tmp_path / "losses.json").read_text())
    assert len(nemo) == 6
    assert [line["reduced_train_loss"] for line in ours] == nemo


@pytest.mark.slow
def test_the_padding_of_teacher_and_student_need_not_agree(
    train: Callable[..., Path], dump: Callable[..., Path]
) -> None:
    """500 ids: a teacher padded to 512 (TP 2), a student to 504, and the other way round."""
    store = f"model.data.train_ds.store={dump('tp2')}"
    for other in (train("one", store), train("tp2")):
        assert_close(steps(train()), steps(other), STEP_METRICS[:-1], abs=LAYOUT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "precision"), [("tp2", "bf16-mixed"), ("dp2", "bf16-mixed"), ("one", "bf16")]
)
def test_bf16_is_close_to_float32(train: Callable[..., Path], layout: str, precision: str) -> None:
    for a, b in zip(
        steps(train()), steps(train(layout, f"trainer.precision={precision}")), strict=True
    ):
        # bfloat16 rounds by up to 2**-9 = 0.2%. A loss is a mean over hundreds of tokens; a
        # gradient norm has the roundings of all layers, forward and backward.
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)


@pytest.mark.slow
def test_too_little_teacher_mass_is_warned_of_once(train: Callable[..., Path]) -> None:
    """At temperature 2 the twenty stored tokens hold little; at 1 nearly all."""
    warm = train("one", "model.kd.temperature=2.0", "trainer.max_steps=3")
    assert steps(warm)[0]["teacher_mass"] < 0.9 < steps(train())[0]["teacher_mass"]
    text = (warm / "stderr.txt").read_text()
    assert text.count("of its probability at temperature 2 (below 0.9)") == 1
    assert "of its probability" not in (train() / "stderr.txt").read_text()


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        pytest.param("dp2", 2, marks=pytest.mark.slow),
        pytest.param("one", 2, marks=pytest.mark.slow),
        pytest.param("one", 4, marks=pytest.mark.slow),
    ],
)
def test_global_tokens_does_not_depend_on_the_split(
    train: Callable[..., Path], layout: str, size: int
) -> None:
    """Micro-batches of 1, 2 and 4, accumulated 4, 2 and 1 times, over 1 and 2 ranks."""
    option = "+model.kd.normalize=global_tokens"
    one = steps(train("one", option))
    other = steps(train(layout, option, f"model.micro_batch_size={size}"))
    assert_close(one, other, SPLIT_METRICS, abs=SPLIT)
    # With NeMo's own normalization the split shows: the test above could fail.
    mean_of_means = steps(train())
    assert abs(one[0]["reduced_train_loss"] - mean_of_means[0]["reduced_train_loss"]) > 1e-4


@pytest.mark.slow
def test_global_tokens_over_eight_micro_batches(train: Callable[..., Path]) -> None:
    """A global batch of 8 as 8 micro-batches of 1, 4 of 2, and 1 of 4 on each of two ranks."""
    options = ["+model.kd.normalize=global_tokens", "model.global_batch_size=8"]
    eight = steps(train("one", *options))
    for layout, size in (("one", 2), ("dp2", 4)):
        other = steps(train(layout, *options, f"model.micro_batch_size={size}"))
        assert_close(eight, other, SPLIT_METRICS, abs=SPLIT)


def test_without_validation_it_trains_and_saves_what_plain_nemo_loads(
    tiny: Path, dump: Callable[..., Path], tmp_path: Path
) -> None:
    """The README's shortest command, a few steps of it."""
    done = run_script(
        "train_gpt_sft_kd.py",
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.data.train_ds.store={dump()}",
        "+model.kd.alpha=0.5",
        "trainer.max_steps=3",
        "trainer.precision=32",
        "model.global_batch_size=4",
        f"exp_manager.explicit_log_dir={tmp_path}",
        fork=False,  # as a user starts it
    )
    assert "\r" not in done.stdout and "Transformer Engine" not in done.stderr
    assert [line[:15] for line in done.stdout.splitlines() if "/3 " in line] == ["Epoch 0: 3/3 in"]
    assert len(steps(tmp_path)) == 3
    assert list((tmp_path / "checkpoints").glob("*reduced_train_loss=*step=3*"))
    with tarfile.open(tmp_path / "checkpoints" / "gpt_sft_kd.nemo") as archive:
        config = archive.extractfile("./model_config.yaml")
        assert config is not None
        text = config.read().decode()
    target = next(line for line in text.splitlines() if "target:" in line)
    assert Store(dump()).fingerprint in text  # what it was trained on
    assert target.endswith("megatron_gpt_sft_model.MegatronGPTSFTModel")


@pytest.mark.slow
def test_schedules_change_the_weights_and_the_temperature_step_by_step(
    train: Callable[..., Path],
) -> None:
    lines = steps(
        train(
            "pp2",
            "model.kd.support=topk",
            "model.kd.alpha=0.8",
            "model.kd.alpha_end=0.2",
            "model.kd.temperature=2.0",
            "model.kd.temperature_end=1.0",
            "model.kd.schedule_steps=4",
        )
    )
    assert [line["kd_weight"] for line in lines] == pytest.approx([0.8, 0.65, 0.5, 0.35, 0.2, 0.2])
    assert [line["temperature"] for line in lines] == pytest.approx([2, 1.75, 1.5, 1.25, 1, 1])
    for line in lines:
        weight = line["kd_weight"]
        expected = (1 - weight) * line["sft_loss"] + weight * line["kd_loss"]
        assert line["loss"] == pytest.approx(expected, abs=SAME_LINE)
        # NeMo's mean over micro-batches weighs their tokens otherwise: only roughly the same.
        assert line["reduced_train_loss"] == pytest.approx(line["loss"], abs=0.3)
    # The log-sum-exp is known at the dumped temperature alone.
    assert ["teacher_mass" in line for line in lines] == [True] + [False] * 5
