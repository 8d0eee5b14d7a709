"""A server's answer about one row, checked and converted to the top-K of its answer tokens.

The servers return log-probabilities of the softmax over their whole vocabulary, so that the
log-sum-exp is 0. Nothing else tells whether an answer belongs to the row that was sent: the checks
here find answers that are short, shifted, of other tokens, or no log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.forward import NoAnswerOfServerError
from nemo_kd.topk import ABSENT_ID, TopK

NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Errors of decoding an answer; the last one is that of deep nesting."""
MASS_TOLERANCE = 0.02
"""Allowed excess or lack of probability mass: log-probabilities may be rounded to bfloat16."""
LOGPROB_TOLERANCE = 0.02
"""Allowed difference, absolute and relative, between two statements of one log-probability."""
MAX_PADDING = 1e-3
"""Allowed probability of ids beyond the tokenizer's vocabulary, which pad a model's LM head."""


class AnswerError(NoAnswerOfServerError):
    """Error for a row whose answer does not fit it, or is not a distribution."""


class Candidates(NamedTuple):
    """The server's statement about one position: K entries, possibly one more for its token."""

    ids: list[int]
    logprobs: list[float]
    own: float | None
    """Log-probability of the token at this position; None if the server does not state it."""


@dataclass(frozen=True)
class Answer:
    """A decoded answer about a row of S tokens; entry i predicts token i from those before it."""

    positions: Sequence[Any]
    """[S]: in the server's format, see `Wire.candidates`; None where it states nothing."""
    tokens: Sequence[int] | None
    """The tokens as the server saw them; None if it does not return them."""
    prompt_tokens: int | None
    """The number of tokens as the server counted them; None if it does not."""


class Wire(Protocol):
    """A server's format of requests and answers."""

    path: str
    limit_option: str
    """The server's option that raises the limit on K; empty if it has no such limit."""
    cache_option: str
    """The server's option that turns its prefix cache off."""

    def request(self, model: str, tokens: Sequence[int], top_k: int) -> Mapping[str, Any]:
        """Return the body of a request for the top-K at every position of `tokens`."""

    def parse(self, content: bytes) -> Answer:
        """Decode an answer; raise AnswerError if it does not have the expected format."""

    def candidates(self, position: Any, token: int) -> Candidates:
        """Convert an entry of `Answer.positions`, given the row's token at this position."""


def topk_of(answer: Answer, row: Row, spec: StoreSpec, wire: Wire) -> TopK:
    """Return the top-K of a row's A answer tokens: ids and logits [A, K], log-sum-exp 0 [A, 1].

    Ids beyond the vocabulary of `spec` and those of probability 0 become absent. Raises AnswerError
    if the answer does not belong to the row, or its values are not log-probabilities.
    """
    return checked(answer, row, spec, wire).topk(spec.vocab_size)


def checked(answer: Answer, row: Row, spec: StoreSpec, wire: Wire) -> Checks:
    """Return the ids and log-probabilities of a row's A answer tokens, in descending order.

    Raises AnswerError for all that `topk_of` refuses, but for ids beyond the vocabulary.
    """
    tokens = row.input_ids.tolist()
    _check_positions(answer, tokens, spec.vocab_size, wire)
    where = row.loss_mask.nonzero()[0].tolist()
    found = [wire.candidates(answer.positions[i], tokens[i]) for i in where]
    rows = [
        _without_own(each, i, tokens[i], spec.top_k, wire)
        for i, each in zip(where, found, strict=True)
    ]
    try:
        ids = np.array([each.ids for each in rows], np.int64)
    except OverflowError:
        raise AnswerError("the answer has an id of more than 64 bits, which no token has") from None
    logprobs = np.array([each.logprobs for each in rows], np.float32)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    labels = row.input_ids[where].astype(np.int64)
    own = np.array([each.own for each in found], np.float32)
    checks = Checks(ids, logprobs, where)
    checks.ids()
    checks.distribution(2 * spec.vocab_size)  # the LM head's padding is not known
    checks.own(labels, own)
    return checks


def _check_positions(answer: Answer, tokens: list[int], vocab_size: int, wire: Wire) -> None:
    """Raise AnswerError unless the answer has one entry for each token, and none for the first."""
    positions, counted = answer.positions, answer.prompt_tokens
    if counted not in (None, len(tokens)):
        raise AnswerError(f"{len(tokens)} tokens were sent, but the server counted {counted}")
    if len(positions) != len(tokens):
        raise AnswerError(
            f"{len(tokens)} tokens were sent, but the answer has {len(positions)} positions"
        )
    if answer.tokens is not None:
        _check_echo(answer.tokens, tokens, vocab_size)
    if positions[0] is not None:
        raise AnswerError(
            "the answer has log-probabilities for the first token, which nothing predicts: it is "
            "shifted by a position; update the server"
        )
    missing = [i for i, each in enumerate(positions) if each is None][1:]
    if missing:
        raise AnswerError(
            f"the answer has no log-probabilities at {len(missing)} positions, the first of them "
            f"{missing[0]}: it is shifted, or these came from the server's prefix cache; start the "
            f"server with {wire.cache_option}"
        )


def _check_echo(echo: Sequence[int], tokens: list[int], vocab_size: int) -> None:
    if len(echo) != len(tokens):
        raise AnswerError(f"{len(tokens)} tokens were sent, but the answer is about {len(echo)}")
    for i, (seen, sent) in enumerate(zip(echo, tokens, strict=True)):
        # SGLang writes 0 instead of the vocabulary's last id.
        if seen != sent and not (seen == 0 and sent >= vocab_size - 1):
            raise AnswerError(
                f"token {i} is {sent}, but the answer is about {seen} there: it belongs to another "
                "row, or is shifted"
            )


def _without_own(
    found: Candidates, position: int, token: int, top_k: int, wire: Wire
) -> Candidates:
    """Return the K candidates, without the additional entry of a token outside the top-K."""
    ids, logprobs, own = found
    if own is None:
        raise AnswerError(
            f"the answer has no entry for token {token} at position {position}: it is shifted, or "
            "belongs to another row"
        )
    if len(ids) == top_k + 1 and token in ids:
        at = ids.index(token)
        ids, logprobs = ids[:at] + ids[at + 1 :], logprobs[:at] + logprobs[at + 1 :]
    if len(ids) != top_k:
        raise AnswerError(
            f"the answer has {len(found.ids)} ids at position {position}, expected dump.top_k="
            f"{top_k}, and the token's own if it is not among them{_limit(len(ids), top_k, wire)}"
        )
    return Candidates(ids, logprobs, own)


def _limit(count: int, top_k: int, wire: Wire) -> str:
    if count >= top_k or not wire.limit_option:
        return ""
    return f"; raise the server's limit ({wire.limit_option}), or lower dump.top_k"


class Checks:
    """Checks of ids and log-probabilities [A, K] in descending order, at the positions `where`."""

    def __init__(
        self, ids: NDArray[np.int64], logprobs: NDArray[np.float32], where: Sequence[int]
    ) -> None:
        self.all_ids, self.logprobs, self.where = ids, logprobs, where
        self.p = np.exp(logprobs.astype(np.float64))

    def _first(self, bad: NDArray[np.bool_]) -> int | None:
        """Return the index of the first bad row of bad [A]; None without one."""
        return int(bad.argmax()) if bad.any() else None

    def ids(self) -> None:
        ordered = np.sort(self.all_ids, axis=1)
        a = self._first((ordered[:, 1:] == ordered[:, :-1]).any(1) | (ordered[:, 0] < 0))
        if a is not None:
            raise AnswerError(
                f"the answer repeats an id, or has a negative one, at position {self.where[a]}"
            )

    def distribution(self, width: int) -> None:
        """Check `Σ_k p_k <= 1 <= Σ_k p_k + (width - K) p_K`: the other ids have at most p_K."""
        mass = self.p.sum(1)
        rest = (width - self.p.shape[1]) * self.p[:, -1]
        bad = (mass > 1 + MASS_TOLERANCE) | (mass + rest < 1 - MASS_TOLERANCE)
        a = self._first(bad | ~np.isfinite(self.logprobs[:, 0]))
        if a is not None:
            raise AnswerError(
                f"the values at position {self.where[a]} are not the log-probabilities of a "
                f"softmax: the first K have a mass of {mass[a]:.3g}; the server must return raw "
                "log-probabilities (vLLM: --logprobs-mode raw_logprobs)"
            )

    def own(self, labels: NDArray[np.int64], own: NDArray[np.float32]) -> None:
        """Check the log-probabilities own [A] of the row's tokens against the top-K."""
        is_own = self.all_ids == labels[:, None]
        listed = np.where(is_own, self.logprobs, -np.inf).max(1)
        same = np.isclose(own, listed, rtol=LOGPROB_TOLERANCE, atol=LOGPROB_TOLERANCE)
        below = own <= self.logprobs[:, -1] + LOGPROB_TOLERANCE
        a = self._first(~np.where(is_own.any(1), same, below))
        if a is not None:
            i, token = self.where[a], labels[a]
            raise AnswerError(
                f"token {token} at position {i} has log-probability {own[a]:.4g}, which its top-K "
                "contradicts: the answer mixes positions"
            )

    def padding(self, vocab_size: int) -> None:
        mass = np.where(self.all_ids >= vocab_size, self.p, 0).sum(1)
        a = self._first(mass > MAX_PADDING)
        if a is not None:
            raise AnswerError(
                f"ids beyond the tokenizer's {vocab_size} tokens have probability {mass[a]:.3g} at "
                f"position {self.where[a]}; set teacher.tokenizer to the served model's tokenizer"
            )

    def topk(self, vocab_size: int) -> TopK:
        """Return all entries; those beyond the vocabulary, or of probability 0, are absent."""
        self.padding(vocab_size)
        return _absent_at_end(self.all_ids, self.logprobs, vocab_size)


def _absent_at_end(ids: NDArray[np.int64], logprobs: NDArray[np.float32], vocab_size: int) -> TopK:
    absent = (ids >= vocab_size) | np.isneginf(logprobs)
    order = np.argsort(absent, axis=1, kind="stable")
    ids = np.take_along_axis(np.where(absent, ABSENT_ID, ids), order, 1)
    logits = np.take_along_axis(np.where(absent, np.float32(-np.inf), logprobs), order, 1)
    return TopK(
        ids=torch.from_numpy(ids),
        logits=torch.from_numpy(logits),
        logsumexp=torch.zeros(len(ids), 1),
    )
