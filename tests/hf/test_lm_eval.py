"""lm-evaluation-harness on a Hugging Face directory: the tasks of examples/lm_eval, offline."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import models
from tests.conftest import ROOT
from tests.processes import environment

TASKS = ROOT / "examples/lm_eval"
TOKENS = 24  # of a generated answer


def load_rows() -> Any:
    spec = importlib.util.spec_from_file_location("lm_eval_rows", TASKS / "rows.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS = load_rows()


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs() -> list[dict[str, str]]:
    """Code of the standard library: a line and the one after it."""
    lines = [line for line in models.TEXT.splitlines() if line.strip()][:26]
    return [
        {"input": line, "output": after}
        for line, after in zip(lines[::2], lines[1::2], strict=True)
    ]


def test_the_choices_are_the_answer_and_three_others_in_the_same_order_always(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.jsonl", [{"input": str(i), "output": str(i // 2)} for i in range(9)])
    read = list(ROWS.rows_with_choices(sft_file=str(path), version=1.0)["test"])
    assert read == list(ROWS.rows_with_choices(sft_file=str(path))["test"])
    for row in read:
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["answer"]] == row["output"]
    assert {row["answer"] for row in read} > {0, 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": []}], "a.jsonl:1: expected an object with the texts input and output"),
        ([{"input": "a", "output": "b"}, 3], "a.jsonl:2: expected an object"),
        ([{"input": "a", "output": ""}], "a.jsonl:1: expected an object"),
        (
            [{"input": "a", "output": "b", "system": "c"}],
            "a.jsonl:1: system is 'c', which the task",
        ),
        ([{"input": "a", "output": "b"}] * 8, "at least 4 different outputs, found 1"),
        ([], "has no rows"),
    ],
)
def test_a_file_of_other_rows_is_refused(rows: list[Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=re.escape(message)):
        ROWS.rows_with_choices(sft_file=str(path))


def test_without_a_file_the_option_is_named() -> None:
    with pytest.raises(ValueError, match="--metadata sft_file="):
        ROWS.rows(version=1.0)


def evaluate(model: Path, rows: Path, output: Path, *more: str) -> dict[str, dict[str, Any]]:
    """Run the page's command; return the results, by task."""
    home = output / "home"
    options = [
        *("--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"),
        *("--tasks", "sft_loss,sft_choice,sft_generate", "--include_path", str(TASKS)),
        *("--metadata", f"sft_file={rows}", "--gen_kwargs", f"max_gen_toks={TOKENS}"),
        *("--batch_size", "4", "--output_path", str(output), "--log_samples"),
        *more,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *options],
        env=environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(home)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not home.exists()  # nothing is downloaded or cached
    (file,) = output.glob("*/results_*.json")
    results: dict[str, dict[str, Any]] = json.loads(file.read_text())["results"]
    return results


def samples(output: Path, task: str) -> list[dict[str, Any]]:
    (file,) = output.glob(f"*/samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@torch.no_grad()
def loglikelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Of the answer's tokens, in nats, in float64."""
    ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
    start = len(tokenizer(prompt).input_ids)
    logits = model.double()(ids).logits[0, start - 1 : -1]
    return float(-torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum"))


@pytest.mark.slow  # half a minute
def test_before_and_after_training_its_figures_are_those_of_transformers(tmp_path: Path) -> None:
    rows = pairs()
    file = write(tmp_path / "heldout.jsonl", rows)
    found = {}
    model = models.llama("tied_grouped")
    for name in ("before", "after"):
        directory, output = models.save(model, tmp_path / name), tmp_path / f"{name}-results"
        found[name] = evaluate(directory, file, output)
        loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        for sample, row in zip(samples(output, "sft_loss"), rows, strict=True):
            right = loglikelihood(loaded, tokenizer, row["input"], " " + row["output"])
            assert float(sample["filtered_resps"][0][0]) == pytest.approx(right, abs=1e-3)
        for sample in samples(output, "sft_choice"):
            scores = [float(score) for score, _ in sample["filtered_resps"]]
            doc = sample["doc"]
            choices = [" " + choice for choice in doc["choices"]]
            expected = [loglikelihood(loaded, tokenizer, doc["input"], one) for one in choices]
            assert scores == pytest.approx(expected, abs=1e-3)
        overfit(model, rows)
    before, after = found["before"], found["after"]
    assert after["sft_loss"]["bits_per_byte,none"] < 0.5 * before["sft_loss"]["bits_per_byte,none"]
    assert after["sft_choice"]["acc,none"] > max(0.9, before["sft_choice"]["acc,none"])
    assert after["sft_generate"]["chrf,none"] > before["sft_generate"]["chrf,none"] + 10


@pytest.mark.slow  # half a minute
def test_after_a_chat_template_no_space_is_scored(tmp_path: Path) -> None:
    directory = models.save(models.llama("tied_grouped"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = "{% for m in messages %}|{{ m['content'] }}|{% endfor %}A:"
    tokenizer.save_pretrained(directory)
    file = write(tmp_path / "heldout.jsonl", pairs())
    evaluate(directory, file, tmp_path / "results", "--apply_chat_template")
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    for sample, row in zip(samples(tmp_path / "results", "sft_loss"), pairs(), strict=True):
        right = loglikelihood(loaded, tokenizer, f"|{row['input']}|A:", row["output"])
        assert float(sample["filtered_resps"][0][0]) == pytest.approx(right, abs=1e-3)


def overfit(model: Any, rows: list[dict[str, str]]) -> None:
    """Train on the rows themselves, so that every figure must improve."""
    tokenizer = models.tokenizer()
    batch = tokenizer(
        [f"{row['input']} {row['output']}{tokenizer.eos_token}" for row in rows],
        return_tensors="pt",
        padding=True,
    )
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.slow
def test_the_page_names_tasks_that_there_are() -> None:
    from lm_eval.tasks import TaskManager

    page = (ROOT / "docs/evaluation.md").read_text()
    named = {name for names in re.findall(r"--tasks (\S+)", page) for name in names.split(",")}
    named |= {"humaneval_instruct", "mbpp_instruct", "minerva_math"}
    assert len(named) == 3 + 6 + 3
    assert named <= set(TaskManager(include_path=str(TASKS)).all_tasks)
