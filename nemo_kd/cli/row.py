"""One sample for the eye: each token, and what the teacher thought of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_kd.cli.tokenizers import Tokenizer
from nemo_kd.store import Store
from nemo_kd.topk import ABSENT_ID


@dataclass(frozen=True)
class Choice:
    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """An answer token; the target's rank and probability are None where it is not stored.

    Ranks count from 1, the teacher's first choice.
    """

    position: int
    id: int
    text: str
    rank: int | None
    probability: float | None
    top: list[Choice]
    mass: float
    """Of all stored ids."""


@dataclass(frozen=True)
class RowView:
    row: int
    tokens: list[str]
    answers: list[Answer]

    @property
    def pieces(self) -> list[tuple[str, Answer | None]]:
        """The text token by token, with the teacher's view where it is an answer token."""
        by_position = {answer.position: answer for answer in self.answers}
        return [(text, by_position.get(place)) for place, text in enumerate(self.tokens)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def view_row(store: Store, row: int, tokenizer: Tokenizer, top: int) -> RowView:
    """The sample of source row `row`, with the `top` most likely ids of each answer token."""
    sample = store[store.index_of(row)]
    topk = sample.topk.at(1.0)
    p = np.exp(topk.logits - topk.logsumexp[:, None], dtype=np.float64)
    answers = []
    for a, position in enumerate(sample.answer_positions().tolist()):
        ids = topk.ids[a]
        label = int(sample.input_ids[position])
        hits = np.flatnonzero(ids == label)
        column = int(hits[0]) if hits.size else None
        choices = [
            Choice(int(i), tokenizer.text([int(i)]), float(p[a, place]))
            for place, i in enumerate(ids[:top])
            if i != ABSENT_ID
        ]
        rank = None if column is None else column + 1
        probability = None if column is None else float(p[a, column])
        text = tokenizer.text([label])
        answers.append(Answer(position, label, text, rank, probability, choices, float(p[a].sum())))
    tokens = [tokenizer.text([int(i)]) for i in sample.input_ids]
    return RowView(sample.row, tokens, answers)
