"""Convert OpenAssistant's message trees to train.jsonl and val.jsonl for NeMo's chat SFT.

    python examples/tutorial/oasst_to_chat.py 2023-04-12_oasst_all.trees.jsonl.gz data/oasst

Each path from a tree's root to a last answer is one conversation. Deleted messages and all replies
to them are left out, and so are questions without an answer. All conversations of a tree are on the
same side of the split, which does not depend on the other trees of the file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from nemo_kd.cli.failures import reported
from nemo_kd.files import publish
from nemo_kd.outputs import refuse_foreign

SPEAKERS = {"prompter": "User", "assistant": "Assistant"}

Turn = dict[str, str]


def main(
    trees: Annotated[Path, typer.Argument(help="the data set's .trees.jsonl.gz", exists=True)],
    output: Annotated[Path, typer.Argument(help="directory for the two files")],
    val_share: Annotated[float, typer.Option(help="fraction held out", min=0.0, max=1.0)] = 0.05,
    lang: Annotated[str | None, typer.Option(help="language of first messages, such as en")] = None,
    system: Annotated[str, typer.Option(help="system turn of each conversation")] = "",
) -> None:
    """Write OUTPUT/train.jsonl and OUTPUT/val.jsonl."""
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for split in lines:
        refuse_foreign(output / f"{split}.jsonl", "a file of this script", is_ours)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for tree in progress.track(list(read_trees(trees)), description="trees"):
            if lang not in (None, tree["prompt"]["lang"]):
                continue
            split = "val" if place(tree["message_tree_id"]) < val_share else "train"
            for turns in conversations(tree["prompt"]):
                row = {"system": system, "mask": "User", "type": None, "conversations": turns}
                lines[split].append(json.dumps(row, ensure_ascii=False) + "\n")
    output.mkdir(parents=True, exist_ok=True)
    for split, content in lines.items():
        publish(output / f"{split}.jsonl", "".join(content))
    train, val = map(len, lines.values())
    print(f"{output}: {train} training conversations, {val} held out")


def is_ours(content: bytes) -> bool:
    """Whether a file begins with a row such as `main` writes."""
    return content.startswith(b'{"system": ') and b'"mask": "User"' in content.split(b"\n")[0]


def read_trees(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each line's tree; raise BadParameter with the line number of an invalid one."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                tree = json.loads(line)
                yield {"message_tree_id": tree["message_tree_id"], "prompt": tree["prompt"]}
            except (ValueError, KeyError, TypeError):
                raise typer.BadParameter(
                    f"{path}, line {number}: no message tree; expected a .trees.jsonl.gz of "
                    "OpenAssistant/oasst1"
                ) from None


def conversations(message: dict[str, Any], before: tuple[Turn, ...] = ()) -> Iterator[list[Turn]]:
    """Yield every path to a last answer below a message; none below a deleted one."""
    if message["deleted"]:
        return
    turns = (*before, {"from": SPEAKERS[message["role"]], "value": message["text"]})
    longer = [way for reply in message["replies"] for way in conversations(reply, turns)]
    if longer:
        yield from longer
    elif message["role"] == "assistant":
        yield list(turns)


def place(tree: str) -> float:
    """Hash a tree's id to a number in [0, 1), the same in every file."""
    return int.from_bytes(hashlib.sha256(tree.encode()).digest()[:4], "big") / 2**32


if __name__ == "__main__":
    with reported():
        typer.run(main)
