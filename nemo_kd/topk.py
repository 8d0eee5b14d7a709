"""What a teacher said at some tokens: its K most probable ids, their logits and the log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_kd.errors import NemoKDError

ABSENT_ID = -1
"""Fills up a row of fewer than K ids; its logit is -inf. Absent entries are the last of a row."""


def t1_index(temperatures: Sequence[float]) -> int:
    """The index of temperature 1, to which stored log-probabilities are relative."""
    return tuple(temperatures).index(1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class TopK:
    """N rows of a teacher, as numpy arrays in the store and as torch tensors in the loss."""

    ids: Any
    """[N, K] int64: by descending logit; `ABSENT_ID` where a row has fewer than K."""

    logits: Any
    """[N, K] float32: z; -inf for absent ids."""

    logsumexp: Any
    """[N, T] float32: `log Σ_v exp(z_v / T)` over the real vocabulary for each of `temperatures`,
    in nats; [N] for a single temperature. None where it is unknown: only the supports `topk` and
    `vocab` can be trained on."""

    temperatures: tuple[float, ...] = (1.0,)
    """The temperatures of `logsumexp`, in its order."""

    draws: bool = False
    """Whether the logits are log-shares of random draws, unbiased only in a linear gradient."""

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, temperature: float) -> TopK:
        """The same rows with the log-sum-exp [N] of one temperature.

        Errors: NemoKDError where `logsumexp` is known, but not at `temperature`.
        """
        if self.logsumexp is None:
            return replace(self, temperatures=(temperature,))
        if temperature not in self.temperatures:
            raise NemoKDError(
                f"the teacher's log-sum-exp is that of temperature "
                f"{', '.join(f'{t:g}' for t in self.temperatures)}, the loss has temperature "
                f"{temperature:g}: dump with this temperature among dump.temperatures, or give "
                "TopK the log-sum-exp of that temperature"
            )
        if self.logsumexp.ndim == 1:
            return self
        column = self.logsumexp[:, self.temperatures.index(temperature)]
        return replace(self, logsumexp=column, temperatures=(temperature,))

    def tensors(self) -> TopK:
        """The same rows as torch tensors that share the arrays' memory."""
        import torch

        ids, logits = torch.as_tensor(self.ids), torch.as_tensor(self.logits)
        known = self.logsumexp is not None
        return replace(
            self,
            ids=ids,
            logits=logits,
            logsumexp=torch.as_tensor(self.logsumexp) if known else None,
        )
