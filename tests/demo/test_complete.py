"""The converter's and the completer's scripts, one after the other, on a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoints import models
from tests.processes import run_script


@pytest.mark.slow
def test_nemo_completes_a_pruned_checkpoint_as_transformers_does(tmp_path: Path) -> None:
    model = models.llama("tied_grouped")
    models.save(model, tmp_path / "hf")
    (tmp_path / "layers.json").write_text('{"kept": [0, 2, 3]}')
    nemo, layers = tmp_path / "pruned.nemo", tmp_path / "layers.json"
    converted = run_script(
        "convert_hf_to_nemo.py",
        f"{tmp_path}/hf",
        str(nemo),
        f"--keep-layers=@{layers}",
        fork=False,
    )
    prompts = models.TEXT.split("\n\n")[1:4]  # of different lengths
    rows = [json.dumps({"input": text.strip(" "), "output": "none"}) for text in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    completed = run_script(
        "demo/complete.py",
        f"--model=one={nemo}",
        f"--model=other={nemo}",
        f"--prompts={tmp_path}/prompts.jsonl",
        f"--output={tmp_path}/out.json",
        "--samples=3",
        "--tokens=12",
        fork=False,
    )
    assert converted.stderr == completed.stderr == ""  # no warnings of apex and the like
    samples = json.loads((tmp_path / "out.json").read_text())["samples"]
    del model.model.layers[1]
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
    for row in samples:
        text = expected(model, row["prompt"], 12)
        assert row["completions"] == {"one": text, "other": text}


@torch.no_grad()
def expected(model: torch.nn.Module, prompt: str, tokens: int) -> str:
    """Greedy, without a cache; ids beyond the tokenizer's do not exist in NeMo."""
    tokenizer = models.tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.size(1)
    for _ in range(tokens):
        best = model(ids, use_cache=False).logits[0, -1, : models.TOKENS].argmax()
        if best == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best[None, None]], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)
