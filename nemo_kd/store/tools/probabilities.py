"""Probabilities of a store's K ids and of all other ids combined, the rest (tail mass)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nemo_kd.topk import TopK

Rows = NDArray[np.float64]


def log_probabilities(topk: TopK) -> Rows:
    """Return the log-probabilities `z - L` [A, K] at T = 1, in nats; -inf for absent ids."""
    log_p: Rows = topk.logits.astype(np.float64) - topk.at(1.0).logsumexp[:, None]
    return log_p


def rest_of(p: Rows) -> Rows:
    """Return the total probability [A] of all ids other than the K of p [A, K]."""
    return np.clip(1 - p.sum(axis=1), 0, None)


def entropy_with_rest(p: Rows) -> Rows:
    """Return the entropy [A] of K + 1 outcomes, the K ids of p [A, K] and the rest, in nats.

    It is a lower bound of the teacher's entropy.
    """
    return -_x_log_x(p).sum(axis=1) - _x_log_x(rest_of(p))


def _x_log_x(x: Rows) -> Rows:
    logs = np.zeros_like(x)
    np.log(x, out=logs, where=x > 0)
    return x * logs
