# ruff: noqa: E402 (NeMo comes after its patches)
"""Compare the tokens of random prompt-template rows with NeMo's: `python nemo_tokens.py RESULT`.

Writes how many rows came out how, and what differs. Tokenizers: a byte-level one and one of single
characters by transformers, a SentencePiece model by NeMo's own class.
"""

from __future__ import annotations

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
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset

from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.rows import NoAnswerError, PromptEncoder, Row, SFTRows
from nemo_kd.sft.template import PromptTemplate
from nemo_kd.sft.tokenizer import HFTokenizer, tokenizer_fingerprint
from tests.checkpoints import models
from tests.teacher.typist import characters
from tests.tiny import write_data


class SFTDataset(GPTSFTDataset):
    """NeMo's data set, which makes no index file."""

    def _load_dataset(self) -> None:
        self.indexed_dataset: Any = JsonlFile(self.file_path)


CASES = 400
ROWS = 5
TEMPLATES = (
    "{input} {output}",
    "{input}{output}",
    "  {input}   {output}",
    "Q: {input}\\n\\nA:{output}",
    "{system}\\t{input}  and {context} ->  {output}",
    "{input} é → ü {context}{output}",
    "no field but {output}",
    "{context}{context} {output}",
    "a } {input} {output}",
)
TEXTS = (
    "",
    " ",
    "a",
    "  two  spaces ",
    "a\nb\n",
    "naïve → ✓",
    "x" * 30,
    "def f():\n    return ",
)


def settings(draw: random.Random) -> dict[str, Any]:
    template = draw.choice(TEMPLATES)
    fields = [f for f in ("system", "input", "context", "output") if f"{{{f}}}" in template]
    shortened = draw.sample(fields, draw.randint(0, len(fields)))
    return {
        "prompt_template": template,
        "label_key": "output",
        "max_seq_length": draw.choice((1, 3, 8, 13, 20, 40, 200)),
        "truncation_field": ",".join(shortened) or None,
        "truncation_method": draw.choice(("left", "right")),
        **{name: draw.random() < 0.4 for name in ("add_bos", "add_eos", "add_sep")},
        "sep_id": 7,
        "virtual_tokens": draw.choice((0, 0, 3)),
        "tokens_to_generate": draw.choice((0, 0, 0, 6)),
    }


def row(draw: random.Random) -> dict[str, str]:
    return {
        field: "".join(draw.choices(TEXTS, k=draw.randint(0, 3)))
        for field in ("system", "input", "context", "output")
    }


def compare(theirs: Any, ours: Any, path: Path, draw: random.Random) -> Iterator[str]:
    """The outcome of each row of a random file; `differs: …` for a fault."""
    path.write_text("".join(json.dumps(row(draw)) + "\n" for _ in range(ROWS)))
    chosen, answer_only = settings(draw), draw.random() < 0.7
    chosen["add_bos"] &= ours.bos_id is not None
    data = SFTDataset(str(path), theirs, answer_only_loss=answer_only, **chosen)
    template = PromptTemplate(tokenizer=ours, reader="nemo", **chosen)
    encode = PromptEncoder(template, answer_only)
    rows = SFTRows(JsonlFile(path), encode, template.max_seq_length)
    for i in range(ROWS):
        value, limit = rows.file[i], data.max_seq_length
        try:
            item = data._process_example(value)
        except IndexError:  # a truncation field that stands in the template twice
            item = None
        if item is None:
            yield "refused" if isinstance(attempt(rows, i), RowError) else "differs: not refused"
            continue
        data.max_seq_length = sys.maxsize
        uncut = len(data._process_example(value)["input_ids"])
        data.max_seq_length = limit
        made = template(value)
        ids = item["input_ids"]
        if [made.prompt, made.answer, made.tokens, made.truncated] != [
            item["context_ids"],
            item["answer_ids"],
            ids,
            len(ids) < uncut,
        ]:
            yield f"differs: {chosen} {value}: {item}, {made}"
            continue
        found, mask = attempt(rows, i), np.array([0, *data._build_loss_mask(item)[1:]])[:limit]
        if isinstance(found, Row):
            same = [found.input_ids.tolist(), found.loss_mask.tolist()] == [
                ids[:limit],
                mask.tolist(),
            ]
        else:
            same = isinstance(found, NoAnswerError) and not (item["answer_ids"] and mask.any())
        truncated = " truncated" * made.truncated
        yield (
            f"{type(found).__name__}{truncated}" if same else f"differs: {chosen} {value}: {found}"
        )


def attempt(rows: SFTRows, i: int) -> Any:
    try:
        return rows[i]
    except RowError as error:
        return error


def tokenizers(directory: Path) -> dict[str, tuple[Any, Any]]:
    """Name → NeMo's and ours."""
    pairs = {}
    bare = models.tokenizer()
    bare.bos_token = None
    bare.add_special_tokens({"cls_token": "<cls>", "additional_special_tokens": ["<a>", "<b>"]})
    made = {"bytes": models.tokenizer(), "characters": characters(), "bare": bare}
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(directory / name)
        pairs[name] = (AutoTokenizer(str(directory / name)), HFTokenizer(directory / name))
    write_data(directory)
    spaced = SentencePieceTokenizer(str(directory / "tokenizer.model"))
    return {**pairs, "sentencepiece": (spaced, spaced)}


def alike(theirs: Any, ours: Any) -> dict[str, bool]:
    """Whether two tokenizers agree in each attribute and method that is used."""
    texts = [*TEXTS, "<a>x <b></s>", "<s> x"]
    ids = [theirs.text_to_ids(text) for text in texts]
    names = ("vocab_size", "bos_id", "eos_id", "space_sensitive")
    return {
        **{name: getattr(theirs, name) == getattr(ours, name) for name in names},
        "ids": ids == [ours.text_to_ids(text) for text in texts],
        "text": [theirs.ids_to_text(one) for one in ids] == [ours.ids_to_text(one) for one in ids],
        "fingerprint": tokenizer_fingerprint(theirs) == tokenizer_fingerprint(ours),
    }


def main(result: str) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, (theirs, ours) in tokenizers(Path(directory)).items():
            draw = random.Random(name)
            outcomes: Counter[str] = Counter()
            for _ in range(CASES):
                outcomes.update(compare(theirs, ours, Path(directory, "rows.jsonl"), draw))
            found[name] = {
                "alike": alike(theirs, ours),
                "space_sensitive": ours.space_sensitive,
                "outcomes": outcomes,
            }
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
