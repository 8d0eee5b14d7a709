"""Rows of an SFT file as documents of lm-evaluation-harness, which imports this file by its path.

A row is one JSON object per line with the texts `input` and `output`. Keys that would change the
prompt, such as `system`, are refused, as in a dump; others, such as `id`, are ignored. The file is
named on the command line, `--metadata sft_file=heldout.jsonl`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

from nemo_kd.sft.fields import refuse_unread

CHOICES = 4


def rows(sft_file: str = "", **_: Any) -> dict[str, Dataset]:
    """Return the rows as the split `test`; `_` is what the harness passes of its own.

    `outputs` has the output as the only choice: the harness writes a space before a choice, but
    none after the header of a chat template.

    Errors: ValueError without a file, for a row without the two texts, and for a key that would
    change the prompt.
    """
    read = [{**row, "outputs": [row["output"]]} for row in _read(sft_file)]
    return {"test": Dataset.from_list(read)}


def rows_with_choices(sft_file: str = "", **_: Any) -> dict[str, Dataset]:
    """Add to each row its `choices` and the index `answer` of the right one.

    The other choices are the outputs of the rows that follow, the first after the last. The order
    depends on the row's number only, so that all models see the same questions.
    """
    read = _read(sft_file)
    return {"test": Dataset.from_list([row | _choices(read, i) for i, row in enumerate(read)])}


def bits(row: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Return an output's (log-likelihood in nats, bytes), and whether it is the greedy one."""
    ((loglikelihood, is_greedy),) = results
    size = len(row["output"].encode())
    return {"bits_per_byte": (loglikelihood, size), "acc": int(is_greedy)}


def answer(row: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Return the figures of a generated answer: compared without the white space around both."""
    reference, generated = row["output"].strip(), results[0].strip()
    return {"chrf": (reference, generated), "exact_match": int(generated == reference)}


def _read(sft_file: str) -> list[dict[str, str]]:
    if not sft_file:
        raise ValueError("no SFT file: add --metadata sft_file=heldout.jsonl")
    lines = Path(sft_file).read_text(encoding="utf-8").split("\n")
    found = [_row(line, f"{sft_file}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{sft_file} has no rows")
    return found


def _row(line: str, where: str) -> dict[str, str]:
    row = json.loads(line)
    match row:
        case {"input": str(prompt), "output": str(output)} if prompt and output:
            try:
                refuse_unread(row, ("input", "output"), "the task")
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            return {"input": prompt, "output": output}
    raise ValueError(f"{where}: expected an object with the texts input and output")


def _choices(read: list[dict[str, str]], row: int) -> dict[str, Any]:
    following = (read[row:] + read[:row])[: len(read)]
    texts = list(dict.fromkeys(other["output"] for other in following))[:CHOICES]
    if len(texts) < CHOICES:
        raise ValueError(f"expected at least {CHOICES} different outputs, found {len(texts)}")
    right = texts[0]
    random.Random(row).shuffle(texts)
    return {"choices": texts, "answer": texts.index(right)}
