"""One teacher out of several: the mixture of their probabilities over the same tokens.

    m(v) = Σ_a w_a p_a(v),    p_a(v) = exp(z_a(v) - L_a) where teacher a kept v, else 0

Of an id that a teacher did not keep, nothing is known but that it is at most as likely as the last
one kept. So it adds nothing to m(v): its probability stays where the teacher's store has it, in
the rest, and the rest of the mixture `1 - Σ m(v)` is never less than the weighted rests. Hence

    m(v) <= Σ_a w_a (p_a(v) over all V) <= m(v) + Σ_{a without v} w_a p_a(last kept)

with equality on the left for ids that every teacher kept, and so everywhere at K = V. Logits are
`log m`, the log-sum-exp is 0: `exp(logit - lse)` is the mixture's probability.
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
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.manifest import Manifest
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Sample
from nemo_kd.store.tools.transform import Progress, refuse_own_source, write_samples
from nemo_kd.topk import ABSENT_ID, TopK


def average(
    stores: Sequence[Store],
    directory: str | Path,
    weights: Sequence[float],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """One store of the teachers' mixture, the K largest of each token, sample by sample.

    K, profile, shards, template and source are the first store's; `spec.teacher` says what was
    averaged. Weights count as shares of their sum. The temperature is 1.0 alone: the log-sum-exp
    of a mixture at another one does not follow from the teachers' own.

    StoreError where tokens, rows, tokenizer or vocabulary differ: it names the row or the field.
    """
    refuse_own_source(stores, [directory])
    shares = _shares(weights, stores)
    for other in stores[1:]:
        _refuse_other_rows(stores[0], other)
    first = stores[0].manifest.spec
    spec = replace(first, temperatures=(1.0,), teacher=_description(stores, shares))
    samples = _averaged(stores, shares, first.top_k)
    return write_samples(samples, directory, spec, overwrite=overwrite, progress=progress)


def mix(teachers: Sequence[TopK], weights: Sequence[float], top_k: int) -> TopK:
    """The `top_k` likeliest ids of the mixture; weights sum to 1.

    Each teacher: ids and logits [A, K_a], log-sum-exp [A, T] with T = 1 among its temperatures.
    Returns ids [A, K], logits `log m` [A, K] by falling value, ties by the lower id, and the
    log-sum-exp 0 [A, 1]. At least one teacher has `K_a >= top_k`.
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
    """[A, K]: log-probabilities; those that rounding lets sum to more than 1 are scaled to 1."""
    log_p: NDArray[np.float64] = topk.logits.astype(np.float64) - topk.at(1.0).logsumexp[:, None]
    return log_p - np.maximum(np.logaddexp.reduce(log_p, axis=1, keepdims=True), 0)


def _add_equal(
    ids: NDArray[np.int64], log_p: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows of rising ids [A, M]: the probabilities of equal ids added, in the first's place.

    The places of the others are absent.
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
                        f"{store.directory} differ; only stores over the same tokens can be "
                        "averaged: dump both with one tokenizer, template and length limit"
                    )
        yield replace(first, topk=mix([one.topk for one in samples], weights, top_k))


def _shares(weights: Sequence[float], stores: Sequence[Store]) -> list[float]:
    if len(stores) < 2 or len(weights) != len(stores):
        raise StoreError(
            f"{len(weights)} weights for {len(stores)} stores: give two stores or more, and a "
            "weight for each"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise StoreError(f"weights must be above 0, not {list(weights)}; leave such a store out")
    return [weight / sum(weights) for weight in weights]


def _refuse_other_rows(first: Store, other: Store) -> None:
    here, there = first.manifest.spec, other.manifest.spec
    for store in (first, other):
        if store.manifest.spec.profile == Sampled.name:
            raise StoreError(
                f"{store.directory} has the profile sampled, draws that have no top-K; average "
                "stores of the profiles plain, compact or top_p"
            )
    for name, a, b in (
        ("vocab_size", here.vocab_size, there.vocab_size),
        (
            "tokenizer.fingerprint",
            here.tokenizer.get("fingerprint"),
            there.tokenizer.get("fingerprint"),
        ),
    ):
        if a != b:
            raise StoreError(
                f"{first.directory} and {other.directory} cannot be averaged: {name} is {a!r} "
                f"and {b!r}; the same id must be the same token in both"
            )
    alone = np.setxor1d(first.rows, other.rows)
    if alone.size:
        has = first if alone[0] in first.rows else other
        raise StoreError(
            f"{first.directory} and {other.directory} cannot be averaged: row {alone[0]} is only "
            f"in {has.directory}; dump both over the same file"
        )


def _description(stores: Sequence[Store], shares: Sequence[float]) -> dict[str, Any]:
    """What takes the teacher's place in the spec."""
    teachers = [store.manifest.spec.teacher for store in stores]
    names = (
        f"{share:.4g} {teacher.get('name') or store.directory.name}"
        for store, teacher, share in zip(stores, teachers, shares, strict=True)
    )
    parts = [
        {"weight": share, "store": store.fingerprint, "teacher": teacher}
        for store, teacher, share in zip(stores, teachers, shares, strict=True)
    ]
    return {"name": " + ".join(names), "average": parts}
