"""The pages that lead from data to a student work as they are written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import models
from tests.conftest import ROOT
from tests.distribution.blocks import blocks_of
from tests.distribution.walkthrough import missing
from tests.processes import environment

LAPTOP = ROOT / "docs/laptop.md"
# Page → what its reader has already.
PAGES = {
    "docs/laptop.md": {"teacher_directory", "data.jsonl"},
    "README.md": {"teacher.nemo", "student.nemo", "train.jsonl", "heldout.jsonl"},
}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_command_reads_was_made_by_one_before_it(page: str) -> None:
    assert missing(ROOT / page, PAGES[page]) == []


def test_a_store_that_no_command_makes_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = LAPTOP.read_text().replace("output_dir=heldout_store", "output_dir=another")
    page.write_text(text)
    assert missing(page, PAGES["docs/laptop.md"]) == ["heldout_store"] * 2


@pytest.mark.slow
def test_the_page_works_from_its_first_model_to_the_last_figure(tmp_path: Path) -> None:
    """Its commands, run by bash as they are printed, on a tiny teacher of the same depth."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    config = models.llama("tied_grouped").config
    config.num_hidden_layers = 30
    models.save(LlamaForCausalLM(config), tmp_path / "teacher_directory")
    rows = [{"input": line, "output": line[::-1]} for line in models.TEXT.splitlines() if line]
    text = "".join(json.dumps(row) + "\n" for row in rows[:96])
    (tmp_path / "data.jsonl").write_text(text)
    for name in ("examples", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    blocks = [block.text for block in blocks_of(LAPTOP) if block.language == "bash"]
    commands = [text for text in blocks if "make demo" not in text and "export PATH" not in text]
    done = subprocess.run(
        ["bash", "-e"],
        input="\n".join(commands),
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    figures = json.loads((tmp_path / "student.json").read_text())
    assert 0 < figures["set0/sft_loss"] < 20
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student_hf")
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    # The page evaluates in bf16-mixed; transformers computes in float32.
    assert held_out_loss(exported, rows) == pytest.approx(figures["set0/sft_loss"], rel=0.01)
    assert (tmp_path / "student_hf/README.md").is_file()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rates = {row["step"]: row["lr"] for row in map(json.loads, lines) if "lr" in row}
    assert max(rates, key=lambda step: rates[step]) <= 11


@torch.no_grad()
def held_out_loss(model: Any, rows: list[dict[str, str]]) -> float:
    """Of the tokens of each output and the end of sequence after it, in nats per token."""
    tokenizer, losses = models.tokenizer(), []
    for row in rows:
        prompt = tokenizer(row["input"]).input_ids
        answer = [*tokenizer(" " + row["output"]).input_ids, tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
        losses += loss.tolist()
    return sum(losses) / len(losses)
