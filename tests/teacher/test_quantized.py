"""A teacher whose quantized weights transformers does not move is loaded where it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd.cli.teacher import load, read
from nemo_kd.hf import loading
from tests.served.conftest import configuration
from tests.teacher.typist import write_typist


class Loader:
    """In place of bitsandbytes and HQQ, which need a GPU: full weights that are not moved."""

    def __init__(self) -> None:
        self.device_map: Any = None

    def from_pretrained(self, path: str, *, config: Any, **options: Any) -> tuple[Any, Any]:
        self.device_map = options.pop("device_map", None)
        quantization = config.quantization_config
        del config.quantization_config
        model, info = AutoModelForCausalLM.from_pretrained(path, config=config, **options)
        model.config.quantization_config = quantization
        model.to = self.refuse
        return model, info

    @staticmethod
    def refuse(*_: Any) -> None:
        raise ValueError("`.to` is not supported")


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"load_in_8bit": True},
        {"quant_method": "hqq"},
    ],
)
def test_weights_that_cannot_be_moved_are_loaded_to_their_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: dict[str, Any]
) -> None:
    write_typist(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantization})
    )
    loader = Loader()
    monkeypatch.setattr(loading, "AutoModelForCausalLM", loader)
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n')
    paths = [f"model.restore_from_path={tmp_path}", f"data.file_path={tmp_path}/rows.jsonl"]
    paths += [f"output_dir={tmp_path}/store"]
    cfg = configuration("teacher.kind=hf", *paths)
    assert load(read(cfg), cfg).layout.device == torch.device("cpu")
    assert loader.device_map == {"": torch.device("cpu")}
