# ruff: noqa: E402 (NeMo comes after its patches)
"""Compare random conversations with NeMo's data set: `python nemo_talk.py RESULT`.

Turns neither are empty nor end with whitespace: there NeMo's own mask is shifted. Tokenizers: a
byte-level one by transformers, a SentencePiece model by NeMo's own class, without labels, which
NeMo does not find in its tokens.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_kd.nemo import cpu

cpu.install()
sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # `tests`

import numpy as np
from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

from nemo_kd.nemo.conversations import NemosConversations
from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.reader import Model, open_rows
from tests.sft.vocabularies import gpt2_like
from tests.tiny import write_data

CASES = 300
KINDS = (None, None, "VALUE_TO_TEXT", "TEXT_TO_VALUE")
TEXTS = ("a", "hello there", "def f():\n    return 1", "naïve → ✓", "x" * 30, " two  spaces")


def conversation(draw: random.Random, kinds: tuple[str | None, ...]) -> dict[str, Any]:
    kind = draw.choice(kinds)
    turns = []
    for i in range(draw.randint(2, 6)):
        turn = {"from": ("User", "Assistant")[i % 2], "value": "".join(draw.choices(TEXTS, k=2))}
        turns.append({**turn, "label": draw.choice((None, "good:4,bad:0")) if i % 2 else None})
    return {"system": draw.choice(TEXTS), "mask": "User", "type": kind, "conversations": turns}


def compare(rows: Any, nemos: NemosConversations, number: int) -> str:
    value = rows.file[number]
    try:
        theirs = nemos(copy.deepcopy(value))
    except RowError:
        return "refused by NeMo"
    ours = rows.encode(value)
    if list(ours.input_ids) != theirs.input_ids.tolist():  # type: ignore[union-attr]
        return f"differs: {value}: tokens"
    same = np.array_equal(ours.loss_mask, theirs.loss_mask)
    return "same" if same else f"differs: {value}: {ours.loss_mask}, {theirs.loss_mask}"


def outcomes(tokenizer: Any, kinds: tuple[str | None, ...], path: Path) -> Iterator[str]:
    draw = random.Random(0)
    path.write_text("".join(json.dumps(conversation(draw, kinds)) + "\n" for _ in range(CASES)))
    config, model = RowConfig(chat=True), Model(tokenizer=tokenizer, max_seq_length=4096)
    rows = open_rows(config, JsonlFile(path), model)
    nemos = NemosConversations(config, model)
    return (compare(rows, nemos, i) for i in range(CASES))


def altered(path: Path) -> list[bool]:
    """Whether the check of NeMo's reader counts each row: only spaces at an end are stripped."""
    values = [{"input": "a", "output": text} for text in ("b", "  b", "\tb")]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    model = Model(tokenizer=gpt2_like(), max_seq_length=100)
    rows = open_rows(RowConfig(reader="nemo"), JsonlFile(path), model)
    found = [rows.check(i).altered for i in range(3)]
    turns = [("User", "a"), ("Assistant", "b"), ("User", "c"), ("Assistant", "d")]
    for end in ("", "\n"):  # NeMo's mask is shifted after a newline
        values = [{"from": name, "value": text + end} for name, text in turns]
        path.write_text(json.dumps({"system": "s", "conversations": values, "mask": "User"}) + "\n")
        talk = open_rows(RowConfig(reader="nemo"), JsonlFile(path), model, nemos=NemosConversations)
        found.append(talk.check(0).altered)
    return found


def main(result: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_data(directory)
        spaced = SentencePieceTokenizer(str(directory / "tokenizer.model"))
        tokenizers = {"bytes": (gpt2_like(), KINDS), "sentencepiece": (spaced, (None,))}
        path = directory / "rows.jsonl"
        found: dict[str, Any] = {
            name: Counter(outcomes(*chosen, path)) for name, chosen in tokenizers.items()
        }
        found["altered"] = altered(path)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
