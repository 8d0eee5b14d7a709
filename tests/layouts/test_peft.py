"""NeMo's adapters under distillation: trained, saved, restored; the base model stays as it is."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_kd.nemo.installed import has_adapters
from tests.distribution.blocks import run_nemo_kd
from tests.layouts.conftest import LAYOUTS
from tests.processes import error_of, run_script
from tests.runs import LAYOUT, SPLIT, steps, validations

pytestmark = pytest.mark.skipif(not has_adapters(), reason="this NeMo's model takes no adapters")
LORA = [
    "model.peft.peft_scheme=lora",
    "model.peft.lora_tuning.adapter_dim=4",
    "model.peft.lora_tuning.alpha=8",
]
ALL = "model.peft.lora_tuning.target_modules=[all]"


def evaluated(model: Path, store: Path, directory: Path, *more: str) -> dict[str, float]:
    """The figures of the evaluation script on a store called `heldout`."""
    output = directory / "figures.json"
    run_script(
        "evaluate_gpt_sft_kd.py",
        f"model.restore_from_path={model}",
        f"model.data.validation_ds.store={store}",
        "model.data.validation_ds.names=[heldout]",
        "trainer.precision=32",
        f"output={output}",
        *more,
        fork=False,  # as a user starts it
    )
    figures: dict[str, float] = json.loads(output.read_text())
    return figures


def test_lora_lowers_the_loss_and_its_file_gives_it_back(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
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
    adapted = ["model.peft.peft_scheme=lora", f"model.peft.restore_from_path={adapters}"]
    figures = evaluated(tiny / "student.nemo", dump(split="heldout"), tmp_path, *adapted)
    expected = validations(run)[-1]
    for name, value in figures.items():
        assert value == pytest.approx(expected[f"val/{name}"], abs=SPLIT), name
    message = error_of(
        "evaluate_gpt_sft_kd.py",
        f"model.restore_from_path={train()}/checkpoints/gpt_sft_kd.nemo",
        f"model.data.validation_ds.store={dump(split='heldout')}",
        "trainer.precision=32",
        *adapted,
    )
    assert f"{adapters} was trained on {tiny}/student.nemo, but {train()}" in message
    command = f"nemo-kd export {adapters} {run}/hf --base-model {tiny}/student.nemo"
    last = (run / "stderr.txt").read_text().splitlines()[-1]
    assert last == f"the adapters (lora) are {adapters}; for transformers: {command}"
    run_nemo_kd(command.replace(f"{run}/hf", str(tmp_path / "hf")).split()[1:])
    assert (tmp_path / "hf/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "tp2sp", "pp2", "dp2"])
def test_lora_begins_as_the_whole_model_on_every_layout(
    train: Callable[..., Path], layout: str
) -> None:
    """The first step's adapters add nothing; later ones begin from other random numbers."""
    lines = steps(train(layout, *LORA, ALL))
    whole = steps(train())
    assert lines[0]["loss"] == pytest.approx(whole[0]["loss"], abs=LAYOUT)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2", "tp2pp2"])
def test_merged_it_is_a_plain_model_of_the_same_losses(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    processes, more = LAYOUTS[layout]
    run, merged = train(layout, *LORA, ALL), tmp_path / "merged.nemo"
    run_script(
        "merge_lora.py",
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.peft.restore_from_path={run}/checkpoints/gpt_sft_kd.nemo",
        f"output={merged}",
        "trainer.precision=32",
        *more,
        processes=processes,
        fork=False,  # as a user starts it
    )
    expected = validations(run)[-1]
    for name, value in evaluated(merged, dump(split="heldout"), tmp_path).items():
        assert value == pytest.approx(expected[f"val/{name}"], abs=LAYOUT), name


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["ia3", "adapter"])
def test_other_schemes_train(train: Callable[..., Path], scheme: str) -> None:
    run = train("one", f"model.peft.peft_scheme={scheme}")
    assert steps(run)[0]["loss"] == pytest.approx(steps(train())[0]["loss"], abs=LAYOUT)
    first, last = validations(run)  # of the same samples, unlike two steps
    assert last["val/heldout/loss"] < first["val/heldout/loss"]
    said = (run / "stderr.txt").read_text().splitlines()[-1]
    assert said == f"the adapters ({scheme}) are {run}/checkpoints/gpt_sft_kd.nemo"
