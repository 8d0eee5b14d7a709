"""Agreement of teacher and labels, compared with its expected value for labels the teacher drew.

    agreement   mean of 1[top1_t = y_t]     expected   mean of p_t(top1_t)
    surprise    mean of f_t(y_t)            expected   mean of E_{v ~ p_t} f_t(v)

    f_t(v) = -log p_t(v) for a kept id, its lower bound -log min(p_t(last kept), rest_t) for others

over answer tokens t with labels y_t. If each label were drawn from the teacher, measured and
expected values would differ only by chance, with a variance determined by p_t. Every teacher, weak
or strong, is thus judged relative to its own confidence. Agreement with the token before or after
the label reveals shifted rows.

For draws (profile `sampled`), 1[...] is replaced by the fraction of a token's K draws that equal
the label; its expected value is `Σ_v c_v (c_v - 1) / K^2`, where c_v counts the draws of v, which
is at most `Σ_v p_v^2` on average. Surprise is not measured for draws: most labels are not drawn.
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
from nemo_kd.store.tools.probabilities import Rows, log_probabilities, rest_of

ROUNDING = 1e-3
"""Rounding error of the kept ids' total probability; a tail mass below it is noise."""

ERRORS = 3.0
"""Number of standard errors above which a difference is not attributed to chance."""

SHIFT = 2.0
"""Rows count as shifted if agreement with an adjacent token is this many times as high."""

LOW_AGREEMENT = 0.1
HIGH_PERPLEXITY = 100.0
"""Limit for the perplexity of the teacher's own draws. Even a weak model of the language is below
it; an untrained model, or one with another tokenizer, is not."""
MIN_TOKENS = 30
"""Tokens needed to judge the perplexity: fewer may all happen to be hard ones."""

FAR_BELOW = 0.1
WRONG = 2.0
RIGHT = 3.0
"""Agreement is far below its expected value if it is lower by more than 10 percentage points and
the teacher is wrong more than twice as often, or right less than a third as often, as expected."""

EXCESS = 2.0
"""Limit, in nats per token, for the excess of the labels' surprise over its expected value."""

ASK = (
    "check that data.prompt_template is the one the teacher was trained on and that this is its "
    "tokenizer; `nemo-kd show` displays rows"
)


@dataclass(frozen=True)
class Agreement:
    """Sums over answer tokens; `+` combines the sums of two sets of samples."""

    tokens: float = 0.0
    agreed: float = 0.0
    expected: float = 0.0
    variance: float = 0.0
    """Variance of `agreed` if the labels were the teacher's draws."""

    surprise_tokens: float = 0.0
    """Number of tokens counted in `surprise` and `entropy`: 0 for draws."""
    surprise: float = 0.0
    """Surprise of the labels, in nats."""
    surprise_squares: float = 0.0
    entropy: float = 0.0
    """Expected surprise in nats, at most the teacher's entropy."""

    earlier: float = 0.0
    """Agreement with the token before the label."""
    earlier_gain: float = 0.0
    """`earlier` minus the agreement with the labels."""
    earlier_squares: float = 0.0
    """Sum of squares of the per-token terms of `earlier_gain`."""

    later: float = 0.0
    later_gain: float = 0.0
    later_squares: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Agreement(*(a + b for a, b in pairs))

    @classmethod
    def of_sample(cls, sample: Sample, spec: StoreSpec) -> Agreement:
        """Compute the sums over the answer tokens of one sample."""
        log_p = log_probabilities(sample.topk)
        ids = sample.topk.ids
        return cls.of_row(sample.input_ids, sample.answer_positions(), ids, log_p, spec)

    @classmethod
    def of_row(
        cls,
        input_ids: NDArray[Any],
        positions: NDArray[np.int64],
        ids: NDArray[np.int64],
        log_p: Rows,
        spec: StoreSpec,
    ) -> Agreement:
        """Compute the sums from input_ids [S], answer positions [A], ids and log_p [A, K]."""
        if not positions.size:
            return cls()
        p = np.exp(log_p)
        draws = spec.profile == Sampled.name
        padded = np.append(input_ids, -2)  # no token follows the last one
        agreed, earlier, later = (
            _agreed(ids, p, padded[positions + shift], draws) for shift in (0, -1, 1)
        )
        expected = (p * (p - 1 / spec.top_k)).sum(1) if draws else p[:, 0]
        expected = expected.clip(0.0, 1.0)  # float32 rounds 1/K and 1 to values beyond
        of_labels, own = (
            (np.zeros(0), np.zeros(0)) if draws else _surprise(ids, log_p, input_ids[positions])
        )
        earlier_gain, later_gain = earlier - agreed, later - agreed
        return cls(
            tokens=len(positions),
            agreed=agreed.sum(),
            expected=expected.sum(),
            variance=(expected * (1 - expected)).sum(),
            surprise_tokens=len(of_labels),
            surprise=of_labels.sum(),
            surprise_squares=(of_labels**2).sum(),
            entropy=own.sum(),
            earlier=earlier.sum(),
            earlier_gain=earlier_gain.sum(),
            earlier_squares=(earlier_gain**2).sum(),
            later=later.sum(),
            later_gain=later_gain.sum(),
            later_squares=(later_gain**2).sum(),
        )

    def __str__(self) -> str:
        """Describe the measured and expected values in one clause."""
        n = max(self.tokens, 1.0)
        text = (
            f"{self._subject} the label for {self.agreed / n:.1%} of tokens "
            f"({self.expected / n:.1%} expected), the token before it for "
            f"{self.earlier / n:.1%}, the token after it for {self.later / n:.1%}"
        )
        if not self.surprise_tokens:
            return text
        labels, own = (math.exp(x / self.surprise_tokens) for x in (self.surprise, self.entropy))
        return f"{text}; perplexity of the labels {labels:.2f} ({own:.2f} expected)"

    @property
    def _subject(self) -> str:
        return "the teacher's best token is" if self.surprise_tokens else "the teacher's draws are"

    def to_json(self) -> dict[str, float | None]:
        """Return means over tokens; perplexities are None if no surprise was measured."""
        n = max(self.tokens, 1.0)
        values = {
            "agreement": self.agreed / n,
            "agreement_expected": self.expected / n,
            "agreement_one_earlier": self.earlier / n,
            "agreement_one_later": self.later / n,
        }
        sums = {"perplexity_of_labels": self.surprise, "perplexity_expected": self.entropy}
        if self.surprise_tokens:
            values |= {name: math.exp(x / self.surprise_tokens) for name, x in sums.items()}
        rounded = {name: round(float(value), 4) for name, value in values.items()}
        return {**rounded, **{name: rounded.get(name) for name in sums}}

    def warning(self) -> str:
        """Return the reason to doubt that the teacher's rows are correct; empty if none."""
        for where, found in (("before", self._is_earlier()), ("after", self._is_later())):
            if found and not self._knows_nothing():
                return (
                    "the teacher's rows look shifted by one position: each predicts the token "
                    f"{where} its label: {self}. A token's row must be the teacher's prediction "
                    "of that token"
                )
        if self._agreement_is_low():
            return f"agreement is below {LOW_AGREEMENT:.0%}: {ASK} ({self})"
        if self._knows_nothing():
            return f"the teacher's own perplexity is above {HIGH_PERPLEXITY:.0f}: {ASK} ({self})"
        if self._is_far_below() or self._surprises_far_more():
            return f"the teacher does not predict these labels: {ASK} ({self})"
        return ""

    def _is_earlier(self) -> bool:
        return self._is_beside(self.earlier, self.earlier_gain, self.earlier_squares)

    def _is_later(self) -> bool:
        return self._is_beside(self.later, self.later_gain, self.later_squares)

    def _is_beside(self, agreed: float, gain: float, squares: float) -> bool:
        """Return whether the teacher predicts a neighbour of the label rather than the label."""
        significant = gain > ERRORS * math.sqrt(squares)
        return significant and agreed > max(SHIFT * self.agreed, LOW_AGREEMENT * self.tokens)

    def _agreement_is_low(self) -> bool:
        count = LOW_AGREEMENT * self.tokens
        return self.agreed + ERRORS * math.sqrt(count * (1 - LOW_AGREEMENT)) < count

    def _knows_nothing(self) -> bool:
        enough = self.surprise_tokens >= MIN_TOKENS
        return enough and self.entropy > math.log(HIGH_PERPLEXITY) * self.surprise_tokens

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
        lower_bound = self.surprise - self.entropy - ERRORS * math.sqrt(self.surprise_squares)
        return lower_bound > 0 and self.surprise - self.entropy > EXCESS * self.surprise_tokens


def _agreed(ids: NDArray[np.int64], p: Rows, labels: NDArray[Any], draws: bool) -> Rows:
    """Return 1 per token [A] if the first id is the label, else 0.

    For draws, return the fraction of a token's draws that equal the label.
    """
    if draws:
        return np.where(ids == labels[:, None], p, 0.0).sum(1)
    return (ids[:, 0] == labels).astype(np.float64)


def _surprise(ids: NDArray[np.int64], log_p: Rows, labels: NDArray[Any]) -> tuple[Rows, Rows]:
    """Return the labels' surprise f_t(y_t) and its expected value E f_t, both [A] in nats."""
    present = np.isfinite(log_p)
    p, f = np.exp(log_p), -np.where(present, log_p, 0.0)
    rest = rest_of(p)
    last = np.where(present, p, np.inf).min(1)
    other = -np.log(np.minimum(last, np.maximum(rest, ROUNDING)))
    hit = ids == labels[:, None]
    of_label = np.where(hit.any(1), np.where(hit, f, 0.0).sum(1), other)
    return of_label, (p * f).sum(1) + rest * other
