"""Worked problems: right answers, each question once, and the judge of generated answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from worked_problems import TASKS, correct, final, judge, problems

from tests.checkpoints import models
from tests.conftest import ROOT

DRAWN = list(islice(problems(3), 2000))


def of(task: str) -> list[tuple[str, str]]:
    return [(question, answer) for name, question, answer in DRAWN if name == task]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_the_final_answer_follows_from_the_question() -> None:
    for question, answer in of("running_sum"):
        assert final(answer) == str(sum(numbers(question)))
    for question, answer in of("sorting"):
        assert final(answer) == ", ".join(map(str, sorted(numbers(question))))
    for question, answer in of("reversal"):
        words = question.rpartition(": ")[2].rstrip(".").split()
        assert final(answer) == " ".join(reversed(words))
    for question, answer in of("shopping"):
        count, price, other_count, other_price, paid = numbers(question)
        change = paid - count * price - other_count * other_price
        assert final(answer) == str(change) and change > 0


def test_every_step_of_arithmetic_is_right() -> None:
    steps = re.findall(r"^(\d+) ([-+*]) (\d+) = (\d+)$", "\n".join(a for *_, a in DRAWN), re.M)
    assert len(steps) > 2000
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    assert all(operations[sign](int(a), int(b)) == int(c) for a, sign, b, c in steps)


def test_several_wordings_change_the_steps_and_nothing_else() -> None:
    worded = list(islice(problems(3, several_wordings=True), len(DRAWN)))
    wordings: Counter[tuple[str, str]] = Counter()
    for (task, question, answer), (*same, other) in zip(DRAWN, worded, strict=True):
        assert same == [task, question] and final(other) == final(answer)
        lines, others = answer.splitlines(), other.splitlines()
        for line, changed in zip(lines, others, strict=True):
            if task == "reversal":
                assert set(numbers(changed)) <= set(numbers(line))
                assert line.split()[-1] == changed.split()[-1]
            else:
                assert numbers(changed) == numbers(line)
            wordings[task, re.sub(r"[\d, ]+|\S+$", " ", changed).strip()] += 1
    for task in TASKS:
        often = [count for (name, _), count in wordings.items() if name == task and count > 100]
        assert len(often) >= 6
    assert worded == list(islice(problems(3, several_wordings=True), len(DRAWN)))


def test_no_question_is_repeated_and_no_answer_can_be_guessed() -> None:
    assert len({question for _, question, _ in DRAWN}) == len(DRAWN)
    for task in TASKS:
        finals = Counter(final(answer) for _, answer in of(task))
        assert len(of(task)) == 500 and finals.most_common(1)[0][1] < 25


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("3 + 4 = 7\nAnswer: 7", True),
        ("Answer: 7\nAnswer: 8", True),  # went on after its answer
        ("3 + 4 = 8\nAnswer: 8", False),
        ("Answer: 77", False),
        ("3 + 4 = 7", False),
        ("The answer is 7", False),
        ("", False),
    ],
)
def test_only_the_final_answer_counts(written: str, right: bool) -> None:
    assert correct(written, "3 + 4 = 7\nAnswer: 7") is right
    sample: dict[str, Any] = {"reference": "Answer: 7", "completions": {"student": written}}
    empty = sample | {"completions": {"student": ""}}
    found = {"samples": 2, "exact": int(right), "right": f"0{int(right)}"}
    assert judge([empty, sample]) == found


def test_the_splits_have_no_question_in_common(tmp_path: Path) -> None:
    models.tokenizer().save_pretrained(tmp_path / "tokenizer")
    sizes = {"train": 40, "valid": 8, "test": 12}
    command = [sys.executable, str(ROOT / "experiments" / "make_problems.py")]
    command += [f"--tokenizer={tmp_path / 'tokenizer'}", f"--output-dir={tmp_path}"]
    command += [f"--{split}={size}" for split, size in sizes.items()]
    command += ["--groups=3", "--max-tokens=400"]
    subprocess.run(command, check=True, capture_output=True)
    rows = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").open()]
        for split in sizes
    }
    assert {split: len(found) for split, found in rows.items()} == sizes
    assert len({row["input"] for found in rows.values() for row in found}) == 60
    about = json.loads((tmp_path / "data.json").read_text())
    assert about["groups"] == [0] * 4 + [1] * 4 + [2] * 4  # each with every task
    assert about["tasks"] == list(TASKS)
    refused = subprocess.run([*command, "--max-tokens=9"], capture_output=True, text=True)
    assert refused.returncode and "raise --max-tokens" in refused.stderr
