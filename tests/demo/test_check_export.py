"""The comparison of the exported student with what NeMo measured: transformers is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import check_export
import numpy as np
import pytest
import torch

from nemo_kd.store import Sample, StoreSpec, StoreWriter
from nemo_kd.topk import TopK
from tests.checkpoints import models

LENGTHS, ANSWERS, TOKENS = (9, 14, 30), (2, 7, 11), 8


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Arguments of `check_export.main`: figures that are transformers' own."""
    model, tokenizer = models.llama("untied_llama3"), models.tokenizer()
    models.save(model, tmp_path / "hf")
    ids = [tokenizer(models.TEXT[100 * n :]).input_ids[:n] for n in LENGTHS]
    write(tmp_path / "store", ids)
    losses = []
    for row, answers in zip(ids, ANSWERS, strict=True):
        labels = torch.tensor([-100] * (len(row) - answers) + row[-answers:])
        loss = model.double()(torch.tensor([row]), labels=labels[None]).loss
        losses += [loss.item()] * answers
    model.float()
    prompts = [line for line in models.TEXT.splitlines() if line][:3]
    samples = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(TOKENS):
            best = model(tokens).logits[0, -1].argmax()
            tokens = torch.cat([tokens, best[None, None]], dim=1)
        text = tokenizer.decode(tokens[0, -TOKENS:], skip_special_tokens=True)
        samples.append({"prompt": prompt, "completions": {"kd": text}})
    samples[0]["completions"] = {"kd": "another"}
    write_json(tmp_path / "kd.json", {"heldout/sft_loss": float(np.mean(losses))})
    write_json(tmp_path / "completions.json", {"tokens": TOKENS, "samples": samples})
    return {
        "model": tmp_path / "hf",
        "store": tmp_path / "store",
        "evaluation": tmp_path / "kd.json",
        "completions": tmp_path / "completions.json",
        "output": tmp_path / "exported.json",
    }


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write(directory: Path, ids: list[list[int]]) -> None:
    writer = StoreWriter(directory, StoreSpec(top_k=1, vocab_size=models.TOKENS))
    with writer.shard(0) as shard:
        for row, (tokens, answers) in enumerate(zip(ids, ANSWERS, strict=True)):
            mask = np.zeros(len(tokens), np.uint8)
            mask[-answers:] = 1
            teacher = TopK(
                ids=np.zeros((answers, 1), np.int64),
                logits=np.zeros((answers, 1), np.float32),
                logsumexp=np.full((answers, 1), 0.5, np.float32),
            )
            shard.add(
                Sample(
                    row=row,
                    input_ids=np.array(tokens, np.int32),
                    loss_mask=mask,
                    topk=teacher,
                )
            )
    writer.finish(1)


def test_loss_and_completions_are_those_of_transformers(given: dict[str, Any]) -> None:
    check_export.main(**given)
    found = json.loads(given["output"].read_text())
    assert found["sft_loss"] == pytest.approx(found["evaluated"], abs=1e-5)
    assert (found["same_completions"], found["completions"]) == (2, 3)
    assert found["model"] == str(given["model"])


def test_another_loss_is_an_error_and_leaves_no_result(given: dict[str, Any]) -> None:
    loss = json.loads(given["evaluation"].read_text())["heldout/sft_loss"]
    write_json(given["evaluation"], {"heldout/sft_loss": loss + 3e-4})
    with pytest.raises(SystemExit, match=r"held-out loss .* in transformers and of .* in NeMo"):
        check_export.main(**given)
    assert not given["output"].exists()
