"""Refuse, truncate or drop samples longer than the student's sequence length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import NemoKDError
from nemo_kd.loss.names import check_name
from nemo_kd.store import Sample, Store, StoreError

OVER_LONG = ("error", "truncate", "drop")
OVER_LONG_ALIASES = {
    "error": "refuse raise fail",
    "truncate": "cut cutprompt trim",
    "drop": "skip",
}
"""Synonyms and former names, for which an error suggests the valid name."""


@dataclass(frozen=True)
class LengthLimit:
    """The most tokens that a sample may have, and the settings that messages name."""

    tokens: int
    setting: str = "max_seq_length"
    inputs: bool = False
    """The setting counts inputs, one fewer than tokens."""
    over_long: str = "over_long"
    of_model: bool = False
    """The limit is the number of positions of the student; the setting is larger."""

    def __str__(self) -> str:
        if self.of_model:
            return f"the student's limit of {self.tokens}"
        if self.inputs:
            return f"{self.setting} + 1 = {self.tokens}"
        return f"{self.setting}={self.tokens}"

    @property
    def remedy(self) -> str:
        """What lets longer samples in, for a message."""
        if self.of_model:
            return "train a student with more positions"
        return f"raise {self.setting} of this data set"

    @classmethod
    def of_positions(cls, tokens: int, positions: int | None) -> LengthLimit:
        """Return the limit for `max_seq_length` = `tokens` of a student with learned positions."""
        if positions is None or tokens <= positions:
            return cls(tokens)
        return cls(positions, of_model=True)

    @classmethod
    def of_inputs(cls, seq_length: int, naming: Callable[[str], str] = str) -> LengthLimit:
        """Return the limit for `seq_length` inputs; `naming` as in `check_schedule`."""
        names = naming("seq_length"), naming("over_long")
        return cls(seq_length + 1, names[0], inputs=True, over_long=names[1])


@dataclass(frozen=True)
class Fitting:
    """The samples of a store that are used, and how many were truncated or dropped."""

    used: NDArray[np.int64]
    """Indices in the store, ascending."""

    truncated: int
    dropped: int

    def __len__(self) -> int:
        """The number of items in an epoch."""
        return len(self.used)

    def __str__(self) -> str:
        return (
            f"{self.truncated} truncated on the left of their prompt, {self.dropped} dropped, "
            f"{len(self.used)} samples are used"
        )


def fit_lengths(store: Store, limit: LengthLimit, over_long: str = "error") -> Fitting:
    """Select the samples of `store` to use with at most `limit.tokens` tokens.

    `over_long` selects how longer samples are handled. `error`: the store is refused. `truncate`:
    tokens are removed from the left of the prompt; a sample is dropped if none would be left
    before its first answer token. `drop`: all of them are dropped. The teacher saw the complete
    prompt in any case.

    Errors: StoreError for `error`, and where no sample is left; NemoKDError for an unknown
    `over_long`.
    """
    check_name(limit.over_long, over_long, OVER_LONG, OVER_LONG_ALIASES)
    if isinstance(limit.tokens, bool) or not isinstance(limit.tokens, Integral):
        raise NemoKDError(f"{limit.setting} is {limit.tokens!r}: expected a whole number")
    lengths = store.lengths
    long = np.flatnonzero(lengths > limit.tokens)
    if len(long) and over_long == "error":
        raise StoreError(
            f"store {store.origin} has {len(long)} of {len(lengths)} samples with more than "
            f"{limit} tokens (the longest has {lengths.max()}); {limit.remedy}, or set "
            f"{limit.over_long} to truncate or drop"
        )
    fits = [over_long == "truncate" and _fits(store[int(i)], limit.tokens) for i in long]
    dropped = long[~np.array(fits, dtype=bool)]
    used = np.setdiff1d(np.arange(len(lengths)), dropped, assume_unique=True)
    if not len(used):
        raise StoreError(
            f"store {store.origin} has no sample of at most {limit} tokens; its shortest has "
            f"{min(lengths, default=0)}: {limit.remedy}{_or_truncate(over_long, limit)}"
        )
    return Fitting(used, truncated=sum(fits), dropped=len(dropped))


def _or_truncate(over_long: str, limit: LengthLimit) -> str:
    return f", or set {limit.over_long} to truncate" if over_long == "drop" else ""


def truncate_prompt(sample: Sample, max_seq_length: int) -> Sample:
    """The sample's last `max_seq_length` tokens; its teacher rows stay as they are."""
    return replace(
        sample,
        input_ids=sample.input_ids[-max_seq_length:],
        loss_mask=sample.loss_mask[-max_seq_length:],
    )


def _fits(sample: Sample, max_seq_length: int) -> bool:
    """Whether a prompt token is left before the first answer token."""
    too_many = len(sample.input_ids) - max_seq_length
    answers = sample.answer_positions()
    return not len(answers) or bool(answers[0] > too_many)
