"""Distillation in Megatron-Bridge's own loop, with its evaluation, checkpoints and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bridge import loop
from tests.bridge.conftest import Bridge
from tests.bridge.trainings import (
    HALF,
    PRINTED,
    TRAIN,
    assert_equal,
    evaluations,
    options,
    steps,
    transformers_loss,
)
from tests.conftest import ROOT
from tests.runs import SPLIT

pytestmark = pytest.mark.slow  # an environment of its own, and 20 seconds to import Bridge

LOOP = str(ROOT / "tests/bridge/loop.py")


def test_its_losses_are_those_of_megatron_cores_own_loop(
    whole: Path, bridge: Bridge, data: Path
) -> None:
    """The evaluation too, whose last batch is filled up with items that count for nothing."""
    done = bridge(LOOP, data / "student", data / "train", data / "held")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    stdout = (whole / "stdout").read_text()
    assert_equal(steps(stdout), lines[:-1], 1e-5)
    assert_equal(evaluations(stdout)[-1:], lines[-1:], 1e-5)
    assert len(lines) == loop.STEPS + 1


def test_a_mix_with_an_sft_file_is_that_of_megatron_cores_own_loop(
    bridge: Bridge, data: Path, tmp_path: Path
) -> None:
    """The same items in the same order; the loop opens the rows itself."""
    file = data / "rows.jsonl"
    done = bridge(TRAIN, *options(data, tmp_path), "--sft-file", file)
    expected = bridge(LOOP, data / "student", data / "train", data / "held", file)
    lines = [json.loads(line) for line in expected.stdout.splitlines() if line.startswith("{")]
    assert_equal(steps(done.stdout), lines[:-1], 1e-5)
    assert_equal(evaluations(done.stdout)[-1:], lines[-1:], 1e-5)
    assert len(lines) == loop.STEPS + 1


def test_the_exported_student_has_the_evaluated_loss_in_transformers(
    whole: Path, data: Path
) -> None:
    loss = transformers_loss(whole / "student", data / "held")
    last = evaluations((whole / "stdout").read_text())[-1]
    assert last["sft_loss"] == pytest.approx(loss, abs=1e-5)


def test_a_continued_training_is_the_uninterrupted_one(
    whole: Path, bridge: Bridge, data: Path, tmp_path: Path
) -> None:
    first = bridge(TRAIN, *options(data, tmp_path), f"--stop-at={HALF}")
    then = bridge(TRAIN, *options(data, tmp_path))
    stdout = (whole / "stdout").read_text()
    assert len(steps(first.stdout)) == HALF
    assert steps(first.stdout) + steps(then.stdout) == steps(stdout)
    assert evaluations(then.stdout)[-1] == evaluations(stdout)[-1]


@pytest.mark.parametrize(
    ("tolerance", "layout"),
    [
        (SPLIT, []),
        (SPLIT, ["--tensor-parallel=2", "--sequence-parallel"]),
        (SPLIT, ["--pipeline-parallel=2"]),
    ],
    ids=["data", "tensor", "pipeline"],
)
def test_two_processes_train_as_one(
    tolerance: float, layout: list[str], whole: Path, bridge: Bridge, data: Path, tmp_path: Path
) -> None:
    done = bridge(TRAIN, *options(data, tmp_path), *layout, processes=2)
    stdout = (whole / "stdout").read_text()
    assert_equal(steps(done.stdout), steps(stdout), tolerance + PRINTED)
    assert_equal(evaluations(done.stdout), evaluations(stdout), tolerance + PRINTED)


def test_other_data_and_another_loss_are_refused_on_resume(
    whole: Path, bridge: Bridge, data: Path
) -> None:
    given = [word for word in options(data, whole) if not word.startswith("--seed")]
    done = bridge(TRAIN, *given, "--seed=5", "--support=topk", "--allow", "seed", fails=True)
    (line,) = [line for line in done.stderr.splitlines() if "belongs to a run" in line]
    assert "support: bucket in the checkpoint, topk now" in line and "seed" not in line


def test_another_student_is_refused_on_resume(
    whole: Path, bridge: Bridge, data: Path, tmp_path: Path
) -> None:
    """Bridge would continue the first one, and export it under the name of the other."""
    weights = load_file(data / "student/model.safetensors")
    shutil.copytree(data / "student", tmp_path / "other")
    larger = {name: weight * 1.5 for name, weight in weights.items()}
    save_file(larger, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    other = [f"{tmp_path}/other", *options(data, whole)[1:], f"--export={tmp_path}/exported"]
    done = bridge(TRAIN, *other, fails=True)
    (line,) = [line for line in done.stderr.splitlines() if "belongs to a run" in line]
    assert f"student: {data}/student (fingerprint" in line and f"{tmp_path}/other (" in line
    assert not (tmp_path / "exported").exists()


def test_a_complete_training_has_nothing_to_train_and_is_exported(
    whole: Path, bridge: Bridge, data: Path, tmp_path: Path
) -> None:
    done = bridge(TRAIN, *options(data, whole), f"--export={tmp_path}/student")
    assert f"nothing to train: {whole}/checkpoints has iteration {loop.STEPS}," in done.stderr
    assert not steps(done.stdout)
    found, expected = (load_file(path / "student/model.safetensors") for path in (tmp_path, whole))
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_settings_that_do_not_fit_are_refused(bridge: Bridge, data: Path, tmp_path: Path) -> None:
    """Each in one line, before the model is built."""
    done = bridge(str(ROOT / "tests/bridge/refusals.py"), data, tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    file = f"{data}/rows.jsonl"
    expected = {
        "micro_batch": "train.micro_batch_size=2 with dataset.packed: a pack is a micro-batch",
        "context": "model.context_parallel_size=2 with dataset.packed is not supported",
        "packs_of_rows": f"{file}: packed sequences of a file without a teacher are not supported",
        "alpha_of_file": f"alpha=0.5 of {file}: a file without a teacher has nothing to distil",
        "no_student": f"{file} is an SFT file, and dataset.student is None: give the directory",
        "both": "give either path, a store, or file, an SFT file",
        "rows_without_file": "is for SFT files, but there are only stores",
        "unknown_setting": "dataset.rows.prompt_tempalte is unknown; did you mean dataset.rows.p",
        "temperature": "dataset.temperature=2.0, but the loss has temperature=1.0",
        "alpha_beside_weights": "weights of its own: use KDConfig.alpha for the others, not KDConf",
        "alpha_end_of_none": "KDConfig.alpha_end=0.1 has no effect on the training, since each st",
        "precision": "mixed_precision=bf16_mixed: Megatron's optimizer for half precision needs a",
        "multi_token": "model.mtp_num_layers=1: multi-token prediction has no teacher, and Megatr",
        "graphs": "model.cuda_graph_scope=full_iteration: a CUDA graph of a full iteration would",
        "decentralized": "dist.use_decentralized_pg=True leaves megatron.core.parallel_state empty",
        "other_adapters": "has adapters of LoRA(dim=4, alpha=4), but peft is LoRA(dim=4): give the",
    }
    assert found.keys() == expected.keys()
    for name, message in expected.items():
        assert message in found[name] and "\n" not in found[name]


def test_sources_are_opened_once(bridge: Bridge, data: Path, tmp_path: Path) -> None:
    """In a whole training: neither the check nor Bridge opens a store or a tokenizer again."""
    done = bridge(
        str(ROOT / "tests/bridge/opened.py"),
        TRAIN,
        *options(data, tmp_path),
        f"--sft-file={data}/rows.jsonl",
    )
    opened = [line for line in done.stdout.splitlines() if line.startswith("opened ")]
    assert sorted(opened) == [
        f"opened HFTokenizer {data}/student",
        f"opened JsonlFile {data}/rows.jsonl",
        f"opened Store {data}/held",
        f"opened Store {data}/train",
    ]
