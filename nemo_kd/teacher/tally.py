"""Summary of a dump: sums over answer tokens, and the rows with the highest teacher loss.

    nll(label) = L - z_label          if the label is among the K ids
              >= L - z_K              otherwise: a lower bound

A low rate of labels that are the teacher's best token is the first sign of a wrong template or
tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_kd.sft import RowError
from nemo_kd.sft.rows import NoAnswerError, Row
from nemo_kd.store import StoreSpec
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.tools.agreement import Agreement
from nemo_kd.teacher.forward import NoAnswerOfServerError, NoLogitsError
from nemo_kd.topk import TopK

WORST = 5

_DROPPED: dict[type[RowError], str] = {
    NoAnswerError: "without an answer token",
    NoLogitsError: "without a finite logit of the teacher",
    NoAnswerOfServerError: "without a usable answer of the server",
    RowError: "that cannot be read",
}
"""Description of the rows left out, by type of error; an error counts for the first match."""


class Worst(NamedTuple):
    """A row and its mean teacher loss in nats per token, or a lower bound of it."""

    nll: float
    row: int


class Tally:
    """Sums over the rows of one rank; `Tally.total` combines several ranks."""

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self.agreement = Agreement()
        self.rows = self.truncated = 0
        self.dropped = [0] * len(_DROPPED)
        """Number of rows left out of the store, in the order of `_DROPPED`."""
        self.reasons = [""] * len(_DROPPED)
        """The error of one of these rows each."""
        self.mass = np.zeros(len(spec.temperatures))
        """Sum over answer tokens of the probability of the K ids, at each temperature."""
        self.worst: list[Worst] = []

    @property
    def tokens(self) -> int:
        """Number of answer tokens."""
        return int(self.agreement.tokens)

    @property
    def agreed(self) -> float:
        """Number of answer tokens whose label is the teacher's best token.

        For draws, the sum over answer tokens of the fraction of draws that equal the label.
        """
        return self.agreement.agreed

    @property
    def done(self) -> int:
        """Number of processed rows, including dropped ones."""
        return self.rows + sum(self.dropped)

    def add(self, row: Row, topk: TopK) -> None:
        """Add one row with the top-K of its A answer tokens, on the CPU."""
        logits = topk.logits.double().numpy()  # [A, K]; -inf for absent ids
        ids = topk.ids.numpy()
        positions = np.flatnonzero(row.loss_mask[1:]) + 1
        for j, temperature in enumerate(topk.temperatures):
            logsumexp = topk.logsumexp[:, j, None].double().numpy()
            self.mass[j] += np.exp(logits / temperature - logsumexp).sum()
        log_p = logits - topk.at(1.0).logsumexp.double().numpy()[:, None]
        self.agreement += Agreement.of_row(row.input_ids, positions, ids, log_p, self.spec)
        self.rows += 1
        self.truncated += row.truncated
        nll = -_label_log_p(log_p, ids == row.input_ids[positions, None]).mean()
        self._keep([*self.worst, Worst(float(nll), row.row)])

    def drop(self, error: RowError) -> None:
        """Count one row that is left out."""
        kind = [isinstance(error, each) for each in _DROPPED].index(True)
        self.dropped[kind] += 1
        self.reasons[kind] = self.reasons[kind] or " ".join(str(error).split())

    @classmethod
    def total(cls, tallies: Iterable[Tally], spec: StoreSpec) -> Tally:
        total = cls(spec)
        for tally in tallies:
            total.rows += tally.rows
            total.truncated += tally.truncated
            total.dropped = [a + b for a, b in zip(total.dropped, tally.dropped, strict=True)]
            total.reasons = [a or b for a, b in zip(total.reasons, tally.reasons, strict=True)]
            total.agreement += tally.agreement
            total.mass += tally.mass
            total._keep(total.worst + tally.worst)
        return total

    def _keep(self, candidates: list[Worst]) -> None:
        self.worst = sorted(candidates, key=lambda one: (-one.nll, one.row))[:WORST]

    def summary(self) -> str:
        """Return the lines printed at the end of a dump; empty if no rows were processed."""
        left_out = [self.left_out()] * any(self.dropped)
        if not self.tokens:
            return "".join(left_out)
        lines = [
            f"this run: {self.rows} rows, {self.tokens} answer tokens; {self._held()}"
            f"{self.agreement}"
        ]
        lines += left_out
        if self.truncated:
            limit = self.spec.template.get("max_seq_length")
            lines.append(
                f"truncated at data.max_seq_length={limit}: {self.truncated} of {self.rows} rows"
            )
        worst = ", ".join(f"{one.row} ({one.nll:.2f})" for one in self.worst)
        lines.append(f"rows with the highest teacher loss (nats per token): {worst}")
        warning = self.agreement.warning()
        lines += [f"WARNING: {warning}"] if warning else []
        return "\n".join(lines)

    def left_out(self) -> str:
        """Return one line per kind of rows left out, with their number and the error of one."""
        counts = zip(_DROPPED.values(), self.dropped, self.reasons, strict=True)
        return "\n".join(
            f"left out: {count} rows {kind}{reason and f', such as {reason}'}"
            for kind, count, reason in counts
            if count
        )

    def _held(self) -> str:
        if self.spec.profile == Sampled.name:
            return f"{self.spec.top_k} draws per token, "
        held = dict(zip(self.spec.temperatures, self.mass / self.tokens, strict=True))
        others = ", ".join(f"{m:.3f} at T = {t:g}" for t, m in held.items() if t != 1.0)
        return (
            f"the {self.spec.top_k} logits hold {held[1.0]:.3f} of the teacher's mass"
            f"{f' ({others})' if others else ''}, "
        )


def _label_log_p(log_p: NDArray[Any], hit: NDArray[Any]) -> NDArray[Any]:
    """Return the labels' log-probabilities [A], given log_p and hit [A, K].

    If a label is not among the K ids, returns the smallest of their log-probabilities.
    """
    smallest = np.where(np.isneginf(log_p), np.inf, log_p).min(1)
    return np.where(hit.any(1), np.where(hit, log_p, -np.inf).max(1), smallest)
