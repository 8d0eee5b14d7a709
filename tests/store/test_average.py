"""The mixture of several teachers against the dense float64 mixture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nemo_kd.store import Sample, Store, StoreError, StoreSpec, verify
from nemo_kd.store.tools.average import average, mix
from nemo_kd.topk import ABSENT_ID, TopK
from tests.store.samples import sample, spec, store, with_topk, write

# As a share of a probability: half a unit of float32 logits up to 16, three times. The teacher's
# logits and its log-sum-exp, which a mass above 1 is scaled by, and the result.
ROUNDING = 3 * 2.0**-21
HALF = 2.0**-9  # and of float16 log-probabilities, those read and those written


def top(z: NDArray[np.float64], kept: NDArray[np.int64], k: int) -> TopK:
    """The first `kept[a] <= k` ids of each row, the other places absent; ties to the lower id."""
    ids = np.argsort(-z, axis=1, kind="stable")[:, :k]
    logits = np.take_along_axis(z, ids, 1)
    absent = np.arange(k) >= kept[:, None]
    ids, logits = np.where(absent, ABSENT_ID, ids), np.where(absent, -np.inf, logits)
    logsumexp = np.logaddexp.reduce(z, axis=1, keepdims=True)
    return TopK(ids=ids, logits=logits.astype(np.float32), logsumexp=logsumexp.astype(np.float32))


def dense(teacher: TopK, vocab_size: int) -> NDArray[np.float64]:
    """[A, V]: the probabilities of the ids that are there, 0 elsewhere."""
    p = np.zeros((len(teacher), vocab_size + 1))
    log_p = teacher.logits.astype(float) - teacher.at(1.0).logsumexp[:, None]
    np.put_along_axis(p, teacher.ids, np.exp(log_p), 1)
    return p[:, :vocab_size]  # what is absent, id -1, went into the last column


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[NDArray[np.float64]], list[TopK], list[float], int]:
    """(each teacher's logits [A, V], its top-K, the weights, K of the mixture)."""
    vocab_size, answers = draw(st.integers(1, 40)), draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    spread, whole = draw(st.sampled_from((0.0, 1.0, 4.0))), draw(st.booleans())
    z, teachers = [], []
    for _ in range(draw(st.integers(2, 4))):
        # Whole numbers among them: ties.
        z.append(np.round(rng.normal(0, spread, (answers, vocab_size)), rng.integers(0, 3)))
        k = vocab_size if whole else draw(st.integers(1, vocab_size))
        kept = np.full(answers, k) if whole else rng.integers(1, k + 1, answers)
        teachers.append(top(z[-1], kept, k))
    weights = rng.dirichlet(np.ones(len(z))).clip(1e-3)
    top_k = draw(st.integers(1, teachers[0].ids.shape[1]))
    return z, teachers, list(weights / weights.sum()), top_k


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_mixture_is_the_dense_one_of_what_the_teachers_kept(
    case: tuple[list[NDArray[np.float64]], list[TopK], list[float], int],
) -> None:
    """Below the whole mixture by what teachers without the id can hide at most; equal at K = V."""
    z, teachers, weights, top_k = case
    vocab_size = z[0].shape[1]
    mixed = mix(teachers, weights, top_k)
    parts = [w * dense(one, vocab_size) for w, one in zip(weights, teachers, strict=True)]
    known = np.sum(parts, axis=0)
    wholes = [
        w * np.exp(one - np.logaddexp.reduce(one, axis=1, keepdims=True))
        for w, one in zip(weights, z, strict=True)
    ]
    whole = np.sum(wholes, axis=0)
    hidden = np.zeros_like(known)
    for w, one in zip(weights, teachers, strict=True):
        last = np.where(one.logits > -np.inf, one.logits, np.inf).min(axis=1, keepdims=True)
        hidden += np.where(dense(one, vocab_size) > 0, 0, w * np.exp(last - one.logsumexp))
    assert (mixed.logsumexp == 0).all() and mixed.logits.dtype == np.float32
    assert (dense(mixed, vocab_size)[known == 0] == 0).all()
    present = mixed.ids != ABSENT_ID
    assert (present == (mixed.logits > -np.inf)).all()
    rows = np.nonzero(present)[0]
    m, ids = np.exp(mixed.logits[present].astype(float)), mixed.ids[present]
    assert m == pytest.approx(known[rows, ids], rel=ROUNDING)
    assert (m <= whole[rows, ids] * (1 + ROUNDING)).all()
    assert (whole[rows, ids] <= (m + hidden[rows, ids]) * (1 + ROUNDING)).all()
    assert (np.exp(mixed.logits.astype(float)).sum(axis=1) <= 1 + ROUNDING).all()
    # The K largest of what is known, and as many as there are.
    assert (present.sum(axis=1) == np.minimum((known > 0).sum(axis=1), top_k)).all()
    largest = -np.sort(-known, axis=1)[:, :top_k]
    assert np.exp(mixed.logits.astype(float)) == pytest.approx(largest, rel=ROUNDING)
    for ids, logits in zip(mixed.ids, mixed.logits, strict=True):
        assert len(set(ids[logits > -np.inf])) == (logits > -np.inf).sum()


PROFILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compact": {"profile": "compact"},
    "top_p": {"profile": "top_p", "profile_options": {"p": 0.9}},
}


def other_teacher(one: Sample, of: StoreSpec) -> Sample:
    """Another teacher's view of the same tokens: half of its ids are the first's."""
    view = sample(one.row + 100, of, len(one.topk.ids))
    shift = np.where(np.arange(of.top_k) % 2, 7, 0)
    ids = (np.sort(one.topk.ids, axis=1) + shift) % of.vocab_size
    return with_topk(one, ids=ids, logits=view.topk.logits, logsumexp=view.topk.logsumexp)


@pytest.mark.parametrize("first", PROFILES)
@pytest.mark.parametrize("second", PROFILES)
def test_store_of_the_mixture(tmp_path: Path, first: str, second: str) -> None:
    """K, profile and shards are the first's; other temperatures are left out."""
    of = spec(top_k=12, vocab_size=2000, temperatures=(2.0, 1.0), **PROFILES[first])
    there = spec(
        top_k=9,
        vocab_size=2000,
        rows_per_shard=5,
        teacher={"name": "other.nemo"},
        template={"max_seq_length": 64},
        **PROFILES[second],
    )
    samples = [sample(row, of, answers=row % 4) for row in (0, 1, 2, 3, 7)]
    a = Store(write(tmp_path / "a", of, samples))
    narrow = [
        with_topk(
            one,
            ids=one.topk.ids[:, :9],
            logits=one.topk.logits[:, :9],
            logsumexp=one.topk.logsumexp[:, 1:],
            temperatures=(1.0,),
        )
        for one in samples
    ]
    b = Store(write(tmp_path / "b", there, [other_teacher(one, there) for one in narrow]))
    manifest = average([a, b], tmp_path / "m", [1, 3])
    mixed = Store(tmp_path / "m")
    assert list(verify(mixed)) == [] and mixed.rows.tolist() == [0, 1, 2, 3, 7]
    assert replace(manifest.spec, teacher=of.teacher) == replace(of, temperatures=(1.0,))
    parts = manifest.spec.teacher["average"]
    assert [(part["weight"], part["store"]) for part in parts] == [
        (0.25, a.fingerprint),
        (0.75, b.fingerprint),
    ]
    for one, x, y in zip(mixed, a, b, strict=True):
        assert np.array_equal(one.input_ids, x.input_ids)
        p = dense(x.topk, 2000)
        q = dense(y.topk, 2000)
        expected = 0.25 * p + 0.75 * q
        read = dense(one.topk, 2000)
        kept = read > 0
        # A compact store's own error is its levels', some percent where p is small.
        error = 0.05 if first == "compact" else HALF * np.abs(np.log(expected[kept])).max(initial=1)
        assert read[kept] == pytest.approx(expected[kept], rel=error)
        if first != "top_p":
            assert (kept.sum(1) == np.minimum((expected > 0).sum(1), 12)).all()


def test_averaging_a_teacher_with_its_like_changes_nothing(tmp_path: Path) -> None:
    a = Store(store(tmp_path / "a", spec()))
    b = Store(store(tmp_path / "b", spec(teacher={"name": "same.nemo"})))
    average([a, b], tmp_path / "m", [0.3, 0.7])
    for was, now in zip(a, Store(tmp_path / "m"), strict=True):
        assert np.array_equal(was.topk.ids, now.topk.ids)
        assert now.topk.logits == pytest.approx(was.topk.logits - was.topk.logsumexp, rel=2**-10)


def test_stores_over_other_tokens_are_refused(tmp_path: Path) -> None:
    a = Store(store(tmp_path / "a", spec()))

    def refused(message: str, other: Path, weights: tuple[float, ...] = (1, 1)) -> None:
        with pytest.raises(StoreError, match=message):
            average([a, Store(other)], tmp_path / "m", weights)
        assert not (tmp_path / "m" / "manifest.json").exists()

    refused(r"vocab_size is 500 and 501", store(tmp_path / "b", spec(vocab_size=501)))
    tokenizer = {"fingerprint": "c" * 64}
    refused("tokenizer.fingerprint is 'aaaa", store(tmp_path / "c", spec(tokenizer=tokenizer)))
    refused(r"row 6 is only in .*/a;", store(tmp_path / "d", spec(), rows=6))
    draws = spec(profile="sampled", top_k=4)
    counts = with_topk(sample(0, draws, answers=0), draws=True)
    refused("whose draws have no top-K", write(tmp_path / "e", draws, [counts]))
    refused("are the same store; give it once", tmp_path / "a")
    other = store(tmp_path / "other", spec(teacher={"name": "other.nemo"}))
    refused("weights must be positive", other, (1, 0))
    refused("3 weights for 2 stores", other, (1, 1, 1))
    samples = [sample(row, spec(), answers=1 + row % 4) for row in range(7)]
    ids = samples[4].input_ids.copy()
    ids[2] += 1 if ids[2] < 499 else -1
    samples[4] = replace(samples[4], input_ids=ids)
    refused(r"row 4: input_ids in .*/a and in .*/f differ", write(tmp_path / "f", spec(), samples))
