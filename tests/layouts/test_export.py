"""A trained student in transformers: the figures of the evaluation, and NeMo's greedy answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nemo_kd.store import Store
from tests.layouts.test_peft import ALL, LORA, evaluated
from tests.processes import run_program, run_script
from tests.runs import LAYOUT

NEW_TOKENS = 12


def exported(source: Path, output: Path, *more: object) -> PreTrainedModel:
    run_program("examples/convert_nemo_to_hf.py", source, output, *more)
    return loaded(output)


def loaded(directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@torch.no_grad()
def sft_loss(model: PreTrainedModel, store: Path) -> float:
    """Mean cross-entropy of the store's answer tokens."""
    losses = []
    for sample in Store(store):
        ids = torch.from_numpy(np.array(sample.input_ids)).long()
        at = torch.from_numpy(sample.answer_positions())
        losses.append(cross_entropy(model(ids[None]).logits[0, at - 1], ids[at], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2pp2", "dp2dist"])
def test_a_student_has_the_losses_and_answers_of_nemo(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    run, store = train(layout), dump(split="heldout")
    student = run / "checkpoints/gpt_sft_kd.nemo"
    model = exported(student, tmp_path / "hf")
    wanted = evaluated(student, store, tmp_path)["heldout/sft_loss"]
    assert sft_loss(model, store) == pytest.approx(wanted, abs=LAYOUT)
    (checkpoint,) = (run / "checkpoints").glob("*-last")
    for one, tensor in exported(checkpoint, tmp_path / "last").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[one]), one
    card = (tmp_path / "hf/README.md").read_text()
    train_store = Store(dump())
    assert train_store.fingerprint in card and "- knowledge-distillation" in card
    assert "| steps | 6 |" in card and "| K | 20 |" in card and "| kd.alpha | 0.9 |" in card
    assert f"| heldout/sft_loss | {wanted:.4f} |" in card
    run_script(
        "generate_with_teacher.py",
        "teacher.kind=nemo",
        f"model.restore_from_path={student}",
        f"data.file_path={tiny}/heldout.jsonl",
        f"output_dir={tmp_path}/answers",
        "trainer.precision=32",
        f"generation.max_new_tokens={NEW_TOKENS}",
        "generation.keep_unfinished=true",
    )
    rows = (tmp_path / "answers/answers.jsonl").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for sample, row in zip(Store(tmp_path / "answers"), map(json.loads, rows), strict=True):
        first = int(sample.answer_positions()[0])
        prompt = torch.from_numpy(np.array(sample.input_ids[:first])).long()[None]
        found = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        assert found.tolist() == sample.input_ids.tolist()
        text = tokenizer.decode(found[first:], skip_special_tokens=True)
        assert text.strip() == row["output"].strip()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2pp2"])
def test_adapters_have_the_losses_of_nemo(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    run, store = train(layout, *LORA, ALL), dump(split="heldout")
    adapters = run / "checkpoints/gpt_sft_kd.nemo"
    (last,) = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if json.loads(line).get("step") == 6 and "val/heldout/sft_loss" in line
    ]
    wanted = last["val/heldout/sft_loss"]
    base = tiny / "student.nemo"
    merged = exported(adapters, tmp_path / "merged", "--base-model", base)
    assert sft_loss(merged, store) == pytest.approx(wanted, abs=LAYOUT)
    before = exported(base, tmp_path / "base")
    assert abs(sft_loss(before, store) - wanted) > 1e-3  # the comparison can fail
    more = ("--peft", "--base", tmp_path / "base")
    run_program("examples/convert_nemo_to_hf.py", adapters, tmp_path / "peft", *more)
    by_peft = PeftModel.from_pretrained(before, str(tmp_path / "peft")).eval()
    assert sft_loss(by_peft, store) == pytest.approx(wanted, abs=LAYOUT)
