"""A top-K from log-probabilities that another program has stored, rounded or compressed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.checks import checked_topk, deep_faults
from nemo_kd.store.sample import Sample, Tokens
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.padding import Padding, width_of, without_padding
from nemo_kd.topk import TopK

MAX_MASS = 1.1
"""Largest sum of a token's probabilities that is taken for a distribution with rounding errors."""


@dataclass
class Changes:
    """Counts of what a cache's reader changed."""

    padding: Padding
    lowered_tokens: int = 0
    """Number of answer tokens whose probabilities summed to more than 1 and were scaled to 1."""
    padding_labels: int = 0
    """Number of labels that are a pad token, which are not learned."""
    widths: Counter[int] = field(default_factory=Counter)
    """Number of samples by the largest number of ids that a token of theirs has in the cache."""

    def to_json(self) -> dict[str, int]:
        """Return the counts; those of ids always, the others where something was changed."""
        others = {
            "tokens_scaled_to_mass_1": self.lowered_tokens,
            "pad_labels_not_learned": self.padding_labels,
        }
        return {
            "padding_ids_dropped": self.padding.ids,
            **{name: value for name, value in others.items() if value},
        }


def sample_of(
    tokens: Tokens,
    ids: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    spec: StoreSpec,
    changes: Changes,
) -> Sample:
    """Return a sample with the K most probable of the ids [A, n] and logprobs [A, n], n >= K.

    -inf marks an absent entry. Rows are sorted; where their probabilities sum to more than 1, which
    compression can cause, they are scaled to 1 and counted. Ids of the vocabulary's padding are
    dropped and counted. The log-sum-exp is 0. Raises StoreError for anything else that is no top-K.
    """
    if np.isnan(logprobs).any() or (logprobs == np.inf).any():
        raise StoreError("a log-probability is not a number")
    logprobs = np.where(logprobs == -np.inf, -np.inf, logprobs).astype(np.float32)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    logprobs = np.take_along_axis(logprobs, order, 1)
    ids = np.where(np.isneginf(logprobs), -1, np.take_along_axis(ids, order, 1))
    logprobs, lowered = _lowered(logprobs)
    zero = np.zeros((len(ids), 1), np.float32)
    ids, logprobs, found = without_padding(ids, logprobs, zero, spec.vocab_size)
    k, width = spec.top_k, width_of(ids)
    topk = TopK(ids=ids[:, :k], logits=logprobs[:, :k], logsumexp=zero)
    sample = Sample(tokens.row, tokens.input_ids, tokens.loss_mask, topk)
    topk = checked_topk(sample, len(ids), spec)
    for fault in deep_faults(topk, spec):
        raise StoreError(f"answer token {fault.token}, column {fault.column}: {fault.what}")
    changes.padding.add(found)
    changes.widths[width] += 1
    changes.lowered_tokens += lowered
    return Sample(tokens.row, tokens.input_ids, tokens.loss_mask, topk)


def _lowered(logprobs: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """Scale the rows [A, n] whose probabilities sum to more than 1; return their number."""
    with np.errstate(over="ignore"):
        mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    above = mass > 1
    if (mass > MAX_MASS).any():
        a = int(mass.argmax())
        raise StoreError(
            f"answer token {a}: the probabilities sum to {mass[a]:.4g}; these are no "
            "log-probabilities, or they were written with another configuration"
        )
    lowered = np.where(above[:, None], logprobs - np.log(np.maximum(mass, 1))[:, None], logprobs)
    return lowered.astype(np.float32), int(above.sum())
