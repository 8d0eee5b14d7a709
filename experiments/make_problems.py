"""Write worked problems as train.jsonl, valid.jsonl and test.jsonl; data.json says what is where.

All splits are parts of one sequence without repetition, so no question is in two of them. The
problems are independent of each other: the bootstrap's groups of the test split are dealt in turn,
with all tasks in each of them.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer
from worked_problems import TASKS, problems

TEMPLATE = "{input} {output}"  # NeMo's default prompt template, used to count tokens


def main(
    tokenizer: Annotated[Path, typer.Option(help="tokenizer directory, for the token counts")],
    output_dir: Annotated[Path, typer.Option(help="where the files go")],
    train: Annotated[int, typer.Option(help="samples")],
    valid: Annotated[int, typer.Option(help="samples")],
    test: Annotated[int, typer.Option(help="samples")],
    groups: Annotated[int, typer.Option(help="groups of the test split")],
    max_tokens: Annotated[int, typer.Option(help="prompt, answer and end-of-sequence")],
    seed: Annotated[int, typer.Option(help="of the sequence of problems")] = 0,
    several_wordings: Annotated[bool, typer.Option(help="draw a wording for each step")] = False,
) -> None:
    """Write the three splits and data.json."""
    encode = AutoTokenizer.from_pretrained(str(tokenizer))
    output_dir.mkdir(parents=True, exist_ok=True)
    sequence = problems(seed, several_wordings=several_wordings)
    domain = "worded" if several_wordings else "math"
    about: dict[str, Any] = {"domain": domain, "max_tokens": max_tokens, "tasks": list(TASKS)}
    for split, count in (("test", test), ("valid", valid), ("train", train)):
        rows = [
            {"input": question, "output": answer, "task": task}
            for task, question, answer in islice(sequence, count)
        ]
        tokens = [len(encode.tokenize(TEMPLATE.format(**row))) + 1 for row in rows]
        if max(tokens) > max_tokens:
            raise typer.BadParameter(
                f"{split} has a problem of {max(tokens)} tokens; raise --max-tokens"
            )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (output_dir / f"{split}.jsonl").write_text(text, encoding="utf-8")
        about[split] = {"samples": count, "tokens": sum(tokens)}
    about["groups"] = [place // len(TASKS) % groups for place in range(test)]
    (output_dir / "data.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps({key: about[key] for key in ("train", "valid", "test")}))


if __name__ == "__main__":
    typer.run(main)
