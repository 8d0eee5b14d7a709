"""The evaluation script writes NeMo's metrics of generated answers beside the losses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import error_of, run_script
from tests.runs import SPLIT

SETTINGS = (
    "trainer.precision=32",
    "model.data.train_ds.max_seq_length=128",
    "model.micro_batch_size=1",
    "model.global_batch_size=5",
)


def test_generated_answers_are_measured(
    tiny: Path, dump: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    done = run_script(
        "evaluate_gpt_sft_kd.py",
        f"model.restore_from_path={tiny}/teacher.nemo",
        f"model.data.validation_ds.store={dump(split='heldout')}",
        "model.data.validation_ds.names=[heldout]",
        "model.data.validation_ds.metric.name=exact_string_match",
        "model.data.validation_ds.tokens_to_generate=6",
        "trainer.precision=32",
        "model.micro_batch_size=1",
        "model.global_batch_size=5",
        f"output={output}",
    )
    results = json.loads(output.read_text())
    assert {"heldout/loss", "heldout/kd_loss"} < set(results)
    for name in ("exact_string_match", "exact_string_match_heldout"):
        assert 0 <= results[name] <= 1
        assert f"{name:40} {results[name]:.4f}" in done.stdout


def test_sft_files_are_measured_without_a_teacher(
    tiny: Path, dump: Callable[..., Path], tmp_path: Path
) -> None:
    """As a training validates on them: the cross-entropy is that of the store of the same rows."""
    output = tmp_path / "results.json"
    run_script(
        "evaluate_gpt_sft_kd.py",
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.data.validation_ds.store={dump(split='heldout')}",
        f"model.data.validation_ds.file_names=[{tiny}/heldout.jsonl]",
        "model.data.validation_ds.names=[store,file]",
        *SETTINGS,
        f"output={output}",
    )
    both = json.loads(output.read_text())
    again = run_script(
        "evaluate_gpt_sft_kd.py",
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.data.validation_ds.file_names=[{tiny}/heldout.jsonl]",
        *SETTINGS,
        f"output={output}",
    )
    assert f"replaced {output}" in again.stderr
    results = json.loads(output.read_text())
    assert results["set0/sft_loss"] == pytest.approx(both["store/sft_loss"], abs=SPLIT)
    assert results["set0/loss"] == results["set0/sft_loss"] and "set0/kd_loss" not in results


def test_an_output_is_neither_the_model_nor_part_of_a_store(
    tiny: Path, dump: Callable[..., Path], tmp_path: Path
) -> None:
    model, store = shutil.copy(tiny / "student.nemo", tmp_path), dump(split="heldout")
    before = Path(model).read_bytes(), (store / "manifest.json").read_bytes()
    settings = (f"model.restore_from_path={model}", f"model.data.validation_ds.store={store}")
    for output in (model, store / "manifest.json"):
        said = error_of("evaluate_gpt_sft_kd.py", *settings, *SETTINGS, f"output={output}")
        assert f"output: {output} " in said and "source" in said
    assert before == (Path(model).read_bytes(), (store / "manifest.json").read_bytes())
