"""Whether the labels are what the teacher says: measured, and expected of the teacher's own draws.

    agreement   mean of 1[top1_t = y_t]     expected   mean of p_t(top1_t)
    surprise    mean of f_t(y_t)            expected   mean of E_{v ~ p_t} f_t(v)

    f_t(v) = -log p_t(v) of a kept id, -log min(p_t(last kept), rest_t) of another: the least that
             it can be

over answer tokens t with labels y_t. If each label were drawn from the teacher, measured and
expected would differ by chance alone, with a variance that p_t gives: so a weak teacher is judged
by what it claims, as a strong one is. Agreement with the token before the label and after it shows
rows that are shifted.

Of draws (profile `sampled`) the share of a token's K draws that are the label takes the place of
1[...]; expected of it is `Σ_v c_v (c_v - 1) / K^2`, c_v the draws of v, which is at most
`Σ_v p_v^2` on average. Their surprise is not measured: most labels are not among the draws.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store.codecs import Sampled
from nemo_kd.store.sample import Sample
from nemo_kd.store.spec import StoreSpec

ROUNDING = 1e-3
"""Of the kept ids' probability; a rest below it is not known."""

ERRORS = 3.0
"""Standard errors that chance is not taken to explain."""

SHIFT = 2.0
"""Shifted: so many times the labels' agreement is that with the token beside them."""

LOW_AGREEMENT = 0.1
HIGH_PERPLEXITY = 100.0
"""Of its own: whoever knows the language is surer, however weak. Untrained, or of other tokens."""
FEW_TOKENS = 30
"""Fewer may all be hard ones."""

FAR_BELOW = 0.1
WRONG = 2.0
RIGHT = 3.0
"""Far below what is expected: by 10 points at least, and twice as often wrong or a third as often
right as the teacher claims."""

EXCESS = 2.0
"""Nats a token by which labels surprise more than the teacher's own draws would."""

ASK = (
    "is data.prompt_template the one that the teacher was trained on, and is this its tokenizer? "
    "`nemo-kd show` shows rows"
)

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Sums over answer tokens; those of other samples are added with `+`."""

    tokens: float = 0.0
    agreed: float = 0.0
    expected: float = 0.0
    variance: float = 0.0
    """Of `agreed` about `expected`, were the labels the teacher's draws."""

    surprise_tokens: float = 0.0
    """Those of `surprise` and `entropy`: none of draws."""
    surprise: float = 0.0
    """Of the labels; nats."""
    surprise_squares: float = 0.0
    entropy: float = 0.0
    """What is expected of it: at most the teacher's entropy."""

    earlier: float = 0.0
    """Agreement with the token before the label."""
    earlier_gain: float = 0.0
    """`earlier` less the agreement with the labels."""
    earlier_squares: float = 0.0
    """Squares of what `earlier_gain` sums."""

    later: float = 0.0
    later_gain: float = 0.0
    later_squares: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Agreement(*(a + b for a, b in pairs))

    @classmethod
    def of_sample(cls, sample: Sample, spec: StoreSpec) -> Agreement:
        """One sample's answer tokens."""
        topk = sample.topk
        log_p = topk.logits.astype(np.float64) - topk.at(1.0).logsumexp[:, None]
        return cls.of_row(sample.input_ids, sample.answer_positions(), topk.ids, log_p, spec)

    @classmethod
    def of_row(
        cls,
        input_ids: NDArray[Any],
        positions: NDArray[np.int64],
        ids: NDArray[np.int64],
        log_p: Rows,
        spec: StoreSpec,
    ) -> Agreement:
        """input_ids [S], positions [A] of the answer tokens, ids and log-probabilities [A, K]."""
        if not positions.size:
            return cls()
        p = np.exp(log_p)
        draws = spec.profile == Sampled.name
        after = np.append(input_ids, -2)  # no token follows the last one
        here, earlier, later = (
            _agreed(ids, p, after[positions + shift], draws) for shift in (0, -1, 1)
        )
        expected = (p * (p - 1 / spec.top_k)).sum(1) if draws else p[:, 0]
        of_labels, own = (
            (np.zeros(0), np.zeros(0)) if draws else _surprise(ids, log_p, input_ids[positions])
        )
        before, behind = earlier - here, later - here
        return cls(
            tokens=len(positions),
            agreed=here.sum(),
            expected=expected.sum(),
            variance=(expected * (1 - expected)).sum(),
            surprise_tokens=len(of_labels),
            surprise=of_labels.sum(),
            surprise_squares=(of_labels**2).sum(),
            entropy=own.sum(),
            earlier=earlier.sum(),
            earlier_gain=before.sum(),
            earlier_squares=(before**2).sum(),
            later=later.sum(),
            later_gain=behind.sum(),
            later_squares=(behind**2).sum(),
        )

    def __str__(self) -> str:
        """All that is measured, in one clause."""
        n = max(self.tokens, 1.0)
        text = (
            f"{self._subject} the label for {self.agreed / n:.1%} ({self.expected / n:.1%} if "
            f"labels were its own draws), the token before it for {self.earlier / n:.1%}, the "
            f"token after it for {self.later / n:.1%}"
        )
        if not self.surprise_tokens:
            return text
        labels, own = (math.exp(x / self.surprise_tokens) for x in (self.surprise, self.entropy))
        return f"{text}; perplexity of the labels {labels:.2f} ({own:.2f} of its own draws)"

    @property
    def _subject(self) -> str:
        return "its best token is" if self.surprise_tokens else "its draws are"

    def to_json(self) -> dict[str, float]:
        """Means; perplexities where they are measured."""
        n = max(self.tokens, 1.0)
        values = {
            "agreement": self.agreed / n,
            "agreement_expected": self.expected / n,
            "agreement_one_earlier": self.earlier / n,
            "agreement_one_later": self.later / n,
        }
        if self.surprise_tokens:
            values["perplexity_of_labels"] = math.exp(self.surprise / self.surprise_tokens)
            values["perplexity_expected"] = math.exp(self.entropy / self.surprise_tokens)
        return {name: round(float(value), 4) for name, value in values.items()}

    def warning(self) -> str:
        """What these labels say against the teacher's rows; empty when all is well."""
        for where, found in (("before", self._is_earlier()), ("after", self._is_later())):
            if found and not self._knows_nothing():
                return (
                    "the teacher's rows look shifted by one position: each is that of the token "
                    f"{where}: {self}. The row of a token must be what the teacher says before it "
                    "has seen that token"
                )
        if self._agreement_is_low():
            return f"below {LOW_AGREEMENT:.0%}: {ASK} ({self})"
        if self._knows_nothing():
            return f"its own perplexity is above {HIGH_PERPLEXITY:.0f}: {ASK} ({self})"
        if self._is_far_below() or self._surprises_far_more():
            return f"the labels are not what this teacher says: {ASK} ({self})"
        return ""

    def _is_earlier(self) -> bool:
        return self._is_beside(self.earlier, self.earlier_gain, self.earlier_squares)

    def _is_later(self) -> bool:
        return self._is_beside(self.later, self.later_gain, self.later_squares)

    def _is_beside(self, agreed: float, gain: float, squares: float) -> bool:
        """Whether the token beside the label is the one that the teacher means."""
        surely = gain > ERRORS * math.sqrt(squares)
        return surely and agreed > max(SHIFT * self.agreed, LOW_AGREEMENT * self.tokens)

    def _agreement_is_low(self) -> bool:
        count = LOW_AGREEMENT * self.tokens
        return self.agreed + ERRORS * math.sqrt(count * (1 - LOW_AGREEMENT)) < count

    def _knows_nothing(self) -> bool:
        many = self.surprise_tokens >= FEW_TOKENS
        return many and self.entropy > math.log(HIGH_PERPLEXITY) * self.surprise_tokens

    def _is_far_below(self) -> bool:
        below = self.expected - self.agreed
        by_chance = below <= ERRORS * math.sqrt(self.variance)
        wrong, claimed = self.tokens - self.agreed, self.tokens - self.expected
        return (
            not by_chance
            and below > FAR_BELOW * self.tokens
            and (wrong > WRONG * claimed or self.agreed * RIGHT < self.expected)
        )

    def _surprises_far_more(self) -> bool:
        least = self.surprise - self.entropy - ERRORS * math.sqrt(self.surprise_squares)
        return least > 0 and self.surprise - self.entropy > EXCESS * self.surprise_tokens


def _agreed(ids: NDArray[np.int64], p: Rows, labels: NDArray[Any], draws: bool) -> Rows:
    """[A]: 1 where the first id is the label; of draws the share of them that is."""
    if draws:
        return np.where(ids == labels[:, None], p, 0.0).sum(1)
    return (ids[:, 0] == labels).astype(np.float64)


def _surprise(ids: NDArray[np.int64], log_p: Rows, labels: NDArray[Any]) -> tuple[Rows, Rows]:
    """(f_t(y_t), E f_t) [A], nats."""
    present = np.isfinite(log_p)
    p, f = np.exp(log_p), -np.where(present, log_p, 0.0)
    rest = np.clip(1 - p.sum(1), 0, None)
    last = np.where(present, p, np.inf).min(1)
    other = -np.log(np.minimum(last, np.maximum(rest, ROUNDING)))
    hit = ids == labels[:, None]
    of_label = np.where(hit.any(1), np.where(hit, f, 0.0).sum(1), other)
    return of_label, (p * f).sum(1) + rest * other
