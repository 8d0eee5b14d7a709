"""Data for displaying a sample: its tokens and the teacher's choices for each answer token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_kd.cli.tokenizers import RunningText, Tokenizer
from nemo_kd.errors import StoreError
from nemo_kd.store import Store
from nemo_kd.store.tools.probabilities import log_probabilities
from nemo_kd.topk import ABSENT_ID


@dataclass(frozen=True)
class Choice:
    """One of the teacher's most probable ids for a token."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """An answer token and the teacher's prediction for it.

    Rank 1 is the teacher's first choice; rank and probability are None if the token is not among
    the stored ids.
    """

    position: int
    id: int
    text: str
    rank: int | None
    probability: float | None
    top: list[Choice]
    mass: float
    """Total probability of the stored ids."""


@dataclass(frozen=True)
class RowView:
    """A sample as `nemo-kd show` displays it."""

    row: int
    tokens: list[str]
    answers: list[Answer]

    @property
    def pieces(self) -> list[tuple[str, Answer | None]]:
        """The text of each token, paired with its `Answer`, or None for other tokens."""
        by_position = {answer.position: answer for answer in self.answers}
        return [(text, by_position.get(i)) for i, text in enumerate(self.tokens)]

    def to_json(self) -> dict[str, Any]:
        """Return the view as plain values for `--json`."""
        return asdict(self)


def view_row(store: Store, row: int, tokenizer: Tokenizer, top: int) -> RowView:
    """Read the sample of source row `row`, with the `top` most probable ids per answer token.

    A text is what the token adds to those before it: empty within a character of several tokens.
    """
    sample = store[store.index_of(row)]
    topk = sample.topk
    ids = np.concatenate([sample.input_ids, topk.ids[topk.ids != ABSENT_ID]])
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= store.spec.vocab_size:
        raise StoreError(
            f"{store.directory}: row {row} has ids outside [0, {store.spec.vocab_size}); "
            "`nemo-kd verify` lists the damage"
        )
    p = np.exp(log_probabilities(topk))
    answers, tokens, text_so_far = [], list[str](), RunningText(tokenizer)
    for a, position in enumerate(sample.answer_positions().tolist()):
        tokens += [text_so_far.push(i) for i in sample.input_ids[len(tokens) : position].tolist()]
        ids = topk.ids[a]
        label = int(sample.input_ids[position])
        hits = np.flatnonzero(ids == label)
        found = int(hits[0]) if hits.size else None
        choices = [
            Choice(int(i), text_so_far.peek(int(i)), float(p[a, column]))
            for column, i in enumerate(ids[:top])
            if i != ABSENT_ID
        ]
        rank = None if found is None else found + 1
        probability = None if found is None else float(p[a, found])
        text = text_so_far.peek(label)
        answers.append(Answer(position, label, text, rank, probability, choices, float(p[a].sum())))
    tokens += [text_so_far.push(i) for i in sample.input_ids[len(tokens) :].tolist()]
    if tokens:
        tokens[-1] += text_so_far.rest()
    return RowView(sample.row, tokens, answers)
