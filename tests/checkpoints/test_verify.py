"""Conversions are compared with transformers before they appear."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_kd.checkpoints import CheckpointError, open_checkpoint, verify, write_nemo
from nemo_kd.checkpoints.huggingface import HuggingFaceCheckpoint
from nemo_kd.checkpoints.megatron import count_parameters
from tests.checkpoints import models
from tests.processes import run_script


class Altered(HuggingFaceCheckpoint):
    """Reads another tensor than the file has."""

    name_of_tensor = "model.layers.2.self_attn.o_proj.weight"

    def tensor(self, name: str) -> torch.Tensor:
        tensor = super().tensor(name)
        return -tensor if name == self.name_of_tensor else tensor


@pytest.mark.nemo
def test_a_model_with_a_wrong_tensor_is_refused_and_does_not_appear(tmp_path: Path) -> None:
    source = Altered(models.save(models.llama("untied_llama3"), tmp_path / "source"))
    output = tmp_path / "out/a.nemo"
    with pytest.raises(CheckpointError, match=r"logits differ from transformers' by .*no-verify"):
        write_nemo(source, output, [0, 2], compare=True)
    assert list(output.parent.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["untied_llama3", "qwen3_moe"])
def test_the_script_compares_a_small_model_by_default(tmp_path: Path, name: str) -> None:
    model = models.llama(name) if name in models.MODELS else models.family(name)
    models.save(model, tmp_path / "source")
    arguments = [f"{tmp_path}/source", f"{tmp_path}/a.nemo", "--dtype=bfloat16"]
    done = run_script("convert_hf_to_nemo.py", *arguments, "--keep-layers=1")
    assert "logits of 128 tokens differ from transformers' by at most" in done.stdout
    done = run_script("convert_hf_to_nemo.py", *arguments, "--no-verify")
    assert "not compared" in done.stdout


@pytest.mark.slow
def test_an_export_is_compared_with_nemo(tmp_path: Path) -> None:
    models.save(models.family("qwen3"), tmp_path / "source")
    model = write_nemo(open_checkpoint(tmp_path / "source"), tmp_path / "a.nemo", [0, 3]).path
    for options in ([], ["--dtype=bfloat16"]):
        done = run_script(
            "convert_nemo_to_hf.py", str(model), str(tmp_path / f"out{len(options)}"), *options
        )
        assert "logits of 128 tokens differ from NeMo's by at most" in done.stdout
    done = run_script("convert_nemo_to_hf.py", str(model), str(tmp_path / "quick"), "--no-verify")
    assert "NeMo's" not in done.stdout


def test_logits_are_compared_up_to_the_bound() -> None:
    expected = torch.arange(12.0).reshape(3, 4)
    padded = torch.cat([expected, torch.full((3, 2), 99.0)], dim=1)
    padded[1, 2] += 0.5 * verify.BOUND
    found = verify.compare(expected, padded, "model")
    assert found.tokens == 3 and found.difference == pytest.approx(0.5 * verify.BOUND, rel=1e-2)
    for wrong in (2 * verify.BOUND, float("nan")):
        padded[2, 1] = expected[2, 1] + wrong
        with pytest.raises(CheckpointError, match=r"model: the converted model's logits differ"):
            verify.compare(expected, padded, "model")


def test_the_sample_ends_at_the_models_limit(tmp_path: Path) -> None:
    for name, length in (("untied_llama3", 128), ("phi3_longrope", 160), ("qwen2", 128)):
        model = models.llama(name) if name in models.MODELS else models.family(name)
        source = open_checkpoint(models.save(model, tmp_path / name))
        ids = verify.sample_ids(source.model, tmp_path / name)
        assert ids.shape == (1, length) and int(ids.max()) < models.TOKENS


@pytest.mark.nemo
def test_small_models_are_verified_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(models.save(models.llama("tied_grouped"), tmp_path / "source"))
    assert not verify.is_verified(False, source.model)
    assert verify.is_verified(None, source.model) and verify.is_verified(True, source.model)
    monkeypatch.setattr(verify, "MAX_PARAMETERS", count_parameters(source.model, 300) - 1)
    assert not verify.is_verified(None, source.model) and verify.is_verified(
        None, replace(source.model, num_layers=3)
    )
    assert verify.is_verified(True, source.model)
