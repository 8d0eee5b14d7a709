"""The tutorial's data: each answered path through a tree once, each tree in one split; and a dump
reads it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_kd.store import Sample, Store
from tests.checkpoints import models
from tests.conftest import ROOT, Script
from tests.distribution.blocks import run_nemo_kd
from tests.processes import run_script
from tests.teacher.conftest import SETTINGS

Message = dict[str, Any]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}\n{{ message.content }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)


def message(role: str, text: str, *replies: Message, deleted: bool = False) -> Message:
    return {"role": role, "text": text, "lang": "en", "deleted": deleted, "replies": list(replies)}


def ask(text: str, *replies: Message, deleted: bool = False) -> Message:
    return message("prompter", text, *replies, deleted=deleted)


def answer(text: str, *replies: Message, deleted: bool = False) -> Message:
    return message("assistant", text, *replies, deleted=deleted)


def write(path: Path, trees: list[Message]) -> Path:
    with gzip.open(path, "wt") as file:
        for number, tree in enumerate(trees):
            row = {"message_tree_id": f"tree-{number}", "tree_state": "x", "prompt": tree}
            file.write(json.dumps(row) + "\n")
    return path


def convert(trees: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "tutorial" / "oasst_to_chat.py"
    command = [sys.executable, str(script), str(trees), str(output), *options]
    return subprocess.run(command, capture_output=True, text=True)


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(path: Path) -> list[str]:
    return ["/".join(turn["value"] for turn in row["conversations"]) for row in rows(path)]


TREE = ask(
    "q",
    answer("a", ask("more", answer("b"), answer("c", ask("nobody answers")))),
    answer("gone", ask("below it", answer("gone too")), deleted=True),
    answer("d", ask("and", answer("taken back", deleted=True))),
)


def test_each_answered_way_through_a_tree_is_a_conversation(tmp_path: Path) -> None:
    alone = [ask("nobody"), ask("spam", answer("x"), deleted=True)]
    trees = write(tmp_path / "t.gz", [TREE, *alone])
    done = convert(trees, tmp_path / "out", "--val-share=0", "--system=be brief")
    assert done.returncode == 0, done.stderr
    assert "3 training conversations, 0 held out" in done.stdout
    assert said(tmp_path / "out/train.jsonl") == ["q/a/more/b", "q/a/more/c", "q/d"]
    row = rows(tmp_path / "out/train.jsonl")[0]
    assert [turn["from"] for turn in row["conversations"]] == ["User", "Assistant"] * 2
    assert (row["system"], row["mask"], row["type"]) == ("be brief", "User", None)


def test_a_tree_is_on_one_side_whatever_else_is_in_the_file(tmp_path: Path) -> None:
    trees = [ask(f"q{i}", answer("a"), answer("b")) for i in range(200)]
    for name, part in (("all", trees), ("some", trees[:50])):
        done = convert(write(tmp_path / f"{name}.gz", part), tmp_path / name, "--val-share=0.2")
        assert done.returncode == 0, done.stderr
    train, val = (set(said(tmp_path / f"all/{split}.jsonl")) for split in ("train", "val"))
    assert len(train) + len(val) == 400 and 40 <= len(val) <= 120
    assert not {way[:-2] for way in train} & {way[:-2] for way in val}
    assert set(said(tmp_path / "some/val.jsonl")) <= val


def test_another_file_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "messages.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"message_id": "1", "text": "no tree"}\n')
    done = convert(path, tmp_path / "out")
    words = " ".join(done.stderr.replace("│", " ").split())  # in a box, wrapped anywhere
    assert done.returncode == 2 and "line 1: no message tree" in words
    assert not list((tmp_path / "out").glob("*.jsonl"))


def chat_model(name: str, directory: Path) -> Path:
    """A tiny model with a chat template, as a `.nemo`."""
    models.save(models.llama(name), directory / f"{name}_hf")
    tokenizer = models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory / f"{name}_hf")
    nemo = directory / f"{name}.nemo"
    run_script("convert_hf_to_nemo.py", str(directory / f"{name}_hf"), str(nemo))
    return nemo


@pytest.mark.slow
def test_the_tutorial_goes_from_conversations_to_a_student_in_transformers(
    script: Script, tmp_path: Path
) -> None:
    """Its steps, with its scripts and the tokenizer's own chat template."""
    trees = [ask(f"what is {i}", answer(f"it is {i}", ask("why", answer("so")))) for i in range(12)]
    assert convert(write(tmp_path / "t.gz", trees), tmp_path, "--val-share=0.3").returncode == 0
    teacher, student = (chat_model(name, tmp_path) for name in ("tied_grouped", "untied_llama3"))
    for split in ("train", "val"):
        script(
            "dump_teacher_topk.py",
            *SETTINGS,
            "data.chat_template=tokenizer",
            f"model.restore_from_path={teacher}",
            f"data.file_path={tmp_path}/{split}.jsonl",
            f"output_dir={tmp_path}/{split}",
        )
        assert len(Store(tmp_path / split)) == len(rows(tmp_path / f"{split}.jsonl"))
    done = script(
        "train_gpt_sft_kd.py",
        "name=kd",
        f"model.restore_from_path={student}",
        f"model.data.train_ds.store={tmp_path}/train",
        f"model.data.validation_ds.store={tmp_path}/val",
        "model.data.train_ds.max_seq_length=128",
        f"exp_manager.explicit_log_dir={tmp_path}/run",
        "trainer.precision=32",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "model.global_batch_size=2",
        "model.micro_batch_size=2",
        "+model.kd.alpha=0.5",
    )
    (line,) = [row for row in rows(tmp_path / "run/metrics.jsonl") if "val/set0/kd_loss" in row]
    assert line["val/set0/kd_loss"] >= 0
    command = f"nemo-kd export {tmp_path}/run/checkpoints/kd.nemo {tmp_path}/run/hf"
    assert done.stderr.splitlines()[-1].endswith(command)
    run_nemo_kd(command.split()[1:])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/hf")
    losses = [sample_loss(model, sample) for sample in Store(tmp_path / "val")]
    expected = sum(total for total, _ in losses) / sum(count for _, count in losses)
    assert line["val/set0/sft_loss"] == pytest.approx(expected, abs=1e-4)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "why"}], tokenize=False)
    assert asked == "<s>user\nwhy</s>\n"
    model.generate(**tokenizer(asked, return_tensors="pt"), max_new_tokens=2)
    card = (tmp_path / "run/hf/README.md").read_text()
    assert Store(tmp_path / "train").fingerprint in card and "tied_grouped.nemo" in card


@torch.no_grad()
def sample_loss(model: Any, sample: Sample) -> tuple[float, int]:
    """Sum of the cross-entropy of a sample's answer tokens in transformers, and their number."""
    ids = torch.from_numpy(sample.input_ids).long()
    labels = ids.masked_fill(torch.from_numpy(sample.loss_mask) == 0, -100)
    count = int((labels[1:] >= 0).sum())
    return float(model(ids[None], labels=labels[None]).loss) * count, count


def test_rows_of_another_origin_are_not_replaced(tmp_path: Path) -> None:
    trees, output = write(tmp_path / "trees.gz", [ask("a", answer("b"))]), tmp_path / "out"
    for _ in range(2):
        assert convert(trees, output).returncode == 0
    (output / "val.jsonl").write_text('{"input": "a", "output": "b"}\n')
    done = convert(trees, output)
    assert done.returncode == 1 and "val.jsonl would be replaced, but it is not" in done.stderr
    assert (output / "val.jsonl").read_text().startswith('{"input"')
