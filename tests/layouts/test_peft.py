"""NeMo's adapters under distillation: trained, saved, restored; the base model stays as it is."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Script, metrics
from tests.layouts.conftest import LAYOUTS

LORA = ["model.peft.peft_scheme=lora", "model.peft.lora_tuning.adapter_dim=4"]
ALL = "model.peft.lora_tuning.target_modules=[all]"


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "sft_loss" in line]


def held_out(run: Path) -> dict[str, float]:
    return [line for line in metrics(run) if "val/heldout/sft_loss" in line][-1]


def test_lora_lowers_the_loss_and_its_file_gives_it_back(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    script: Script,
    tmp_path: Path,
) -> None:
    run = train("one", *LORA, ALL)
    lines = steps(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    adapters = run / "checkpoints/gpt_sft_kd.nemo"
    with tarfile.open(adapters) as archive:
        weights = archive.extractfile("./model_weights.ckpt")
        assert weights is not None
        names = list(torch.load(io.BytesIO(weights.read()), weights_only=False))
    assert names and all("adapter" in name for name in names)
    figures = tmp_path / "figures.json"
    script(
        "evaluate_gpt_sft_kd.py",
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.peft.restore_from_path={adapters}",
        f"model.data.validation_ds.store={dump(split='heldout')}",
        "model.data.validation_ds.names=[heldout]",
        "trainer.precision=32",
        f"output={figures}",
        *LORA,
        ALL,
    )
    expected = held_out(run)
    for name, value in json.loads(figures.read_text()).items():
        assert value == pytest.approx(expected[f"val/{name}"], abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "tp2sp", "pp2", "dp2"])
def test_lora_begins_as_the_whole_model_on_every_layout(
    train: Callable[..., Path], layout: str
) -> None:
    """The first step's adapters add nothing; later ones begin from other random numbers."""
    lines = steps(train(layout, *LORA, ALL))
    whole = steps(train())
    assert lines[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2", "tp2pp2"])
def test_merged_it_is_a_plain_model_of_the_same_losses(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    script: Script,
    tmp_path: Path,
    layout: str,
) -> None:
    processes, more = LAYOUTS[layout]
    run, merged = train(layout, *LORA, ALL), tmp_path / "merged.nemo"
    script(
        "merge_lora.py",
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.peft.restore_from_path={run}/checkpoints/gpt_sft_kd.nemo",
        f"output={merged}",
        "trainer.precision=32",
        *LORA,
        ALL,
        *more,
        processes=processes,
    )
    figures = tmp_path / "figures.json"
    script(
        "evaluate_gpt_sft_kd.py",
        f"model.restore_from_path={merged}",
        f"model.data.validation_ds.store={dump(split='heldout')}",
        "model.data.validation_ds.names=[heldout]",
        "trainer.precision=32",
        f"output={figures}",
    )
    expected = held_out(run)
    for name, value in json.loads(figures.read_text()).items():
        assert value == pytest.approx(expected[f"val/{name}"], abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["ia3", "adapter"])
def test_other_schemes_train(train: Callable[..., Path], scheme: str) -> None:
    lines = steps(train("one", f"model.peft.peft_scheme={scheme}"))
    assert lines[0]["loss"] == pytest.approx(steps(train())[0]["loss"], abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]
