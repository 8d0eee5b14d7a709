"""A teacher's prediction at N tokens: its K most probable ids, their logits, the log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_kd.errors import NemoKDError

ABSENT_ID = -1
"""Pads a row of fewer than K ids, at its end; the logit is -inf."""


def t1_index(temperatures: Sequence[float]) -> int:
    """The index of temperature 1, to which stored log-probabilities are relative."""
    return tuple(temperatures).index(1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class TopK:
    """A teacher's top-K at N tokens: numpy arrays in the store, torch tensors in the loss.

    Errors: NemoKDError on construction for shapes that do not match.
    """

    ids: Any
    """[N, K] int64: by descending logit; `ABSENT_ID` where a row has fewer than K."""

    logits: Any
    """[N, K] float32: z; -inf for absent ids."""

    logsumexp: Any
    """[N, T] float32: `log Σ_v exp(z_v / T)` over the real vocabulary for each of `temperatures`,
    in nats; [N] for a single temperature. None where it is unknown: only the supports `topk` and
    `vocab` can be trained on."""

    temperatures: tuple[float, ...] = (1.0,)
    """The temperatures of `logsumexp`, in the order of its columns."""

    draws: bool = False
    """Whether the logits are log-frequencies of draws: unbiased only in a linear gradient."""

    def __post_init__(self) -> None:
        shape = tuple(self.ids.shape)
        if len(shape) != 2:
            raise NemoKDError(f"The teacher's ids have shape {shape}, expected [N, K].")
        if tuple(self.logits.shape) != shape:
            raise NemoKDError(
                f"The teacher's logits have shape {tuple(self.logits.shape)}, expected {shape}, as "
                "the ids have."
            )
        columns = (shape[0], len(self.temperatures))
        allowed = (columns, shape[:1]) if len(self.temperatures) == 1 else (columns,)
        if self.logsumexp is not None and tuple(self.logsumexp.shape) not in allowed:
            raise NemoKDError(
                f"The teacher's logsumexp has shape {tuple(self.logsumexp.shape)}, expected "
                f"{' or '.join(map(str, reversed(allowed)))} for ids {shape} and temperatures "
                f"{self.temperatures}."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> TopK:
        """Some of the rows: a slice, a mask or an array of indices."""
        return self.map(lambda array: array[rows])

    def map(self, function: Callable[[Any], Any]) -> TopK:
        """The same teacher with `function` applied to each of its arrays."""
        return replace(
            self,
            ids=function(self.ids),
            logits=function(self.logits),
            logsumexp=None if self.logsumexp is None else function(self.logsumexp),
        )

    def at(self, temperature: float) -> TopK:
        """The same rows with the log-sum-exp [N] of one temperature.

        Errors: NemoKDError where `logsumexp` is known, but not at `temperature`.
        """
        if self.logsumexp is None:
            return replace(self, temperatures=(temperature,))
        if temperature not in self.temperatures:
            known = ", ".join(f"{t:g}" for t in self.temperatures)
            raise NemoKDError(
                f"The teacher's log-sum-exp is known at temperature {known}, but the loss has "
                f"temperature {temperature:g}: dump the teacher at this temperature too, or give "
                "its TopK the log-sum-exp at this temperature."
            )
        if self.logsumexp.ndim == 1:
            return self
        column = self.logsumexp[:, self.temperatures.index(temperature)]
        return replace(self, logsumexp=column, temperatures=(temperature,))

    def tensors(self) -> TopK:
        """The same rows as torch tensors that share the arrays' memory."""
        import torch

        return self.map(torch.as_tensor)
