"""Average several teachers: the mixture of their probabilities over the same tokens.

    m(v) = Σ_a w_a p_a(v),    p_a(v) = exp(z_a(v) - L_a) if teacher a kept v, else 0

An id that a teacher did not keep is known only to be no more likely than that teacher's last kept
id. It adds nothing to m(v): its probability remains in the teacher's tail mass, and the tail mass
of the mixture, `1 - Σ m(v)`, is never less than the weighted tail masses. Hence

    m(v) <= Σ_a w_a (p_a(v) over all V) <= m(v) + Σ_{a without v} w_a p_a(last kept)

with equality on the left for ids kept by every teacher, hence for all ids at K = V. Logits are
`log m` and the log-sum-exp is 0: `exp(logit - lse)` is the mixture's probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.outputs import refuse_inputs
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.manifest import Manifest
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Sample
from nemo_kd.store.spec import ROWS_PER_SHARD
from nemo_kd.store.tools.overlap import refuse_twice
from nemo_kd.store.tools.probabilities import log_probabilities
from nemo_kd.store.tools.selection import Progress, check_intact
from nemo_kd.store.tools.transform import write_samples
from nemo_kd.topk import ABSENT_ID, TopK


def average(
    stores: Sequence[Store],
    directory: str | Path,
    weights: Sequence[float],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the mixture of several stores' teachers over the same samples.

    K, profile, shards, template and source are the first store's; `spec.teacher` records the
    stores and their weights, normalised to sum 1. The result has temperature 1.0 only: the
    mixture's log-sum-exp at other temperatures cannot be computed from those of the teachers.

    Raises StoreError, naming the row or field, if the stores do not hold the same samples.
    """
    refuse_inputs([directory], [store.directory for store in stores])
    refuse_twice(stores)
    for store in stores:
        check_intact(store)
    shares = _shares(weights, stores)
    for other in stores[1:]:
        _refuse_other_rows(stores[0], other)
    first = stores[0].spec
    spec = replace(first, temperatures=(1.0,), teacher=_description(stores, shares))
    if len(stores[0]):  # shards so large that rows without a sample cost nothing
        rows = int(stores[0].rows[-1]) + 1
        spec = replace(spec, rows_per_shard=ROWS_PER_SHARD * -(-rows // len(stores[0])))
    samples = _averaged(stores, shares, first.top_k)
    return write_samples(samples, directory, spec, overwrite=overwrite, progress=progress)


def mix(teachers: Sequence[TopK], weights: Sequence[float], top_k: int) -> TopK:
    """Return the `top_k` most probable ids of the mixture; weights must sum to 1.

    Teachers have ids and logits [A, K_a], and a log-sum-exp at T = 1. At least one must have
    `K_a >= top_k`. Returns ids [A, K], logits `log m` [A, K] in descending order (ties by ascending
    id), and log-sum-exp 0 [A, 1].
    """
    parts = [math.log(w) + _log_p(one) for one, w in zip(teachers, weights, strict=True)]
    ids = np.concatenate([one.ids for one in teachers], axis=1)  # [A, M]
    log_p = np.concatenate(parts, axis=1)  # [A, M]
    order = ids.argsort(axis=1, kind="stable")
    ids, log_m = _add_equal(np.take_along_axis(ids, order, 1), np.take_along_axis(log_p, order, 1))
    order = (-log_m).argsort(axis=1, kind="stable")[:, :top_k]
    logits = np.take_along_axis(log_m, order, 1).astype(np.float32)
    return TopK(
        ids=np.take_along_axis(ids, order, 1),
        logits=logits,
        logsumexp=np.zeros((len(logits), 1), np.float32),
    )


def _log_p(topk: TopK) -> NDArray[np.float64]:
    """Return log-probabilities [A, K], normalised in rows where rounding gives a sum above 1."""
    log_p = log_probabilities(topk)
    return log_p - np.maximum(np.logaddexp.reduce(log_p, axis=1, keepdims=True), 0)


def _add_equal(
    ids: NDArray[np.int64], log_p: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sum the probabilities of equal ids in rows of ascending ids [A, M] into the first of them.

    The other entries of the same id become absent.
    """
    first = np.ones(ids.shape, np.bool_)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    sums = np.full(ids.shape, -np.inf)
    if first.any():
        sums[first] = np.logaddexp.reduceat(log_p.ravel(), np.flatnonzero(first))
    return np.where(first, ids, ABSENT_ID), sums


def _averaged(stores: Sequence[Store], weights: Sequence[float], top_k: int) -> Iterator[Sample]:
    for index in range(len(stores[0])):
        first, *others = samples = [store[index] for store in stores]
        for store, other in zip(stores[1:], others, strict=True):
            for name in ("input_ids", "loss_mask"):
                if not np.array_equal(getattr(first, name), getattr(other, name)):
                    raise StoreError(
                        f"row {first.row}: {name} in {stores[0].directory} and in "
                        f"{store.directory} differ; dump both with the same tokenizer, template "
                        "and length limit to average them"
                    )
        yield replace(first, topk=mix([one.topk for one in samples], weights, top_k))


def _shares(weights: Sequence[float], stores: Sequence[Store]) -> list[float]:
    if len(stores) < 2 or len(weights) != len(stores):
        raise StoreError(
            f"{len(weights)} weights for {len(stores)} stores; give two or more stores and one "
            "weight for each"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise StoreError(
            f"weights must be positive, not {list(weights)}; leave out stores of weight 0"
        )
    return [weight / sum(weights) for weight in weights]


def _refuse_other_rows(first: Store, other: Store) -> None:
    ours, theirs = first.spec, other.spec
    for store in (first, other):
        if store.spec.profile == Sampled.name:
            raise StoreError(
                f"{store.directory} has the profile sampled, whose draws have no top-K; only the "
                "profiles plain, compact and top_p can be averaged"
            )
    for name, a, b in (
        ("vocab_size", ours.vocab_size, theirs.vocab_size),
        (
            "tokenizer.fingerprint",
            ours.tokenizer.get("fingerprint"),
            theirs.tokenizer.get("fingerprint"),
        ),
    ):
        if a != b:
            raise StoreError(
                f"{first.directory} and {other.directory} cannot be averaged: {name} is {a!r} "
                f"and {b!r}; an id must stand for the same token in both"
            )
    unshared = np.setxor1d(first.rows, other.rows)
    if unshared.size:
        has = first if unshared[0] in first.rows else other
        raise StoreError(
            f"{first.directory} and {other.directory} cannot be averaged: row {unshared[0]} is "
            f"only in {has.directory}; dump both from the same file"
        )


def _description(stores: Sequence[Store], shares: Sequence[float]) -> dict[str, Any]:
    """Build the mixture's `spec.teacher`."""
    teachers = [store.spec.teacher for store in stores]
    names = (
        f"{share:.4g} {teacher.get('name') or store.directory.name}"
        for store, teacher, share in zip(stores, teachers, shares, strict=True)
    )
    parts = [
        {"weight": share, "store": store.fingerprint, "teacher": teacher}
        for store, teacher, share in zip(stores, teachers, shares, strict=True)
    ]
    return {"name": " + ".join(names), "average": parts}
