"""What is written is what is read, in every profile, to the precision that the profile promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nemo_kd.store import Sample, Store, StoreError, StoreSpec, verify
from nemo_kd.topk import TopK, t1_index
from tests.store.samples import sample, spec, store, with_topk, write

HALF = 2.0**-10  # float16: half a unit in the last place of values up to 32 is 2^-7, relative 2^-11
WIDTHS = (65_535, 65_536, 65_537, 131_071, 131_072, 262_143, 1 << 31, 1 << 32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[StoreSpec, list[Sample]]:
    vocab_size = draw(st.sampled_from((1, 2, 7, 500, *WIDTHS)))
    top_k = draw(st.integers(1, min(vocab_size, 40)))
    temperatures = draw(st.sampled_from(((1.0,), (1.0, 2.0), (0.5, 1.0, 4.0))))
    of = spec(
        vocab_size=vocab_size,
        top_k=top_k,
        temperatures=temperatures,
        rows_per_shard=draw(st.integers(1, 4)),
    )
    answers = draw(st.lists(st.integers(0, 6), min_size=0, max_size=6))
    return of, [sample(row, of, count, prompt=1) for row, count in enumerate(answers)]


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_plain(case: tuple[StoreSpec, list[Sample]]) -> None:
    of, samples = case
    with TemporaryDirectory() as directory:
        read = list(Store(write(Path(directory) / "s", of, samples)))
    assert [s.row for s in read] == [s.row for s in samples]
    unit = t1_index(of.temperatures)
    for was, now in zip(samples, read, strict=True):
        assert np.array_equal(was.input_ids, now.input_ids)
        assert np.array_equal(was.loss_mask, now.loss_mask)
        assert np.array_equal(was.topk.ids, now.topk.ids) and now.topk.ids.dtype == np.int64
        assert np.array_equal(was.topk.logsumexp, now.topk.logsumexp)
        relative = was.topk.logits - was.topk.logsumexp[:, unit, None]
        error = np.abs(now.topk.logits - was.topk.logits)
        assert (error <= HALF * np.abs(relative) + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_compact_keeps_every_id_and_each_temperature(case: tuple[StoreSpec, list[Sample]]) -> None:
    of, samples = case
    of = replace(of, profile="compact")
    unit = t1_index(of.temperatures)
    with TemporaryDirectory() as directory:
        read = list(Store(write(Path(directory) / "s", of, samples)))
    for was, now in zip(samples, read, strict=True):
        assert np.array_equal(np.sort(was.topk.ids, 1), np.sort(now.topk.ids, 1))
        assert (now.topk.logits[:, 1:] <= now.topk.logits[:, :-1]).all()
        mass = [
            np.exp(s.topk.logits.astype(float) - s.topk.logsumexp[:, [unit]]).sum(1)
            for s in (was, now)
        ]
        assert np.allclose(mass[0], mass[1], atol=1e-3)
        # A shift of all logits by c shifts the log-sum-exp at T by c / T: the same distribution.
        relative = [
            s.topk.logsumexp - s.topk.logsumexp[:, [unit]] / np.array(of.temperatures, np.float32)
            for s in (was, now)
        ]
        assert np.allclose(relative[0], relative[1], atol=1e-5)


@pytest.mark.parametrize("vocab_size", [100, 500, 49_152, 262_144])
@pytest.mark.parametrize("k", [1, 7, 40, 100])
def test_compact_knows_how_many_ids_are_absent(tmp_path: Path, vocab_size: int, k: int) -> None:
    """Of the teacher's few ids, none or all but one absent: the same ids, and their probability."""
    of = spec(profile="compact", vocab_size=vocab_size, top_k=k, temperatures=(1.0, 2.0))
    whole = sample(0, of, 50, spread=3.0)
    present = np.arange(k) < np.random.default_rng(0).integers(1, k + 1, (50, 1))
    logits = np.where(present, whole.topk.logits, -np.inf).astype(np.float32)
    ids = np.where(present, whole.topk.ids, -1)
    lse = np.stack([np.logaddexp.reduce(logits / t, axis=1) for t in (1.0, 2.0)], 1)
    one = with_topk(whole, ids=ids, logits=logits, logsumexp=lse.astype(np.float32))
    (now,) = Store(write(tmp_path / "s", of, [one]))
    assert np.array_equal(now.topk.ids >= 0, present)
    assert np.array_equal(np.isfinite(now.topk.logits), present)
    # As without absent places: a level's step, which is finer where the probability is.
    p = np.zeros((50, vocab_size))
    q = np.zeros((50, vocab_size))
    for of_sample, dense in ((one, p), (now, q)):
        probability = np.exp(of_sample.topk.logits - of_sample.topk.logsumexp[:, :1])
        np.put_along_axis(dense, np.maximum(of_sample.topk.ids, 0), 0, 1)
        for token in range(50):
            kept = of_sample.topk.ids[token] >= 0
            dense[token, of_sample.topk.ids[token][kept]] = probability[token][kept]
    assert np.array_equal(p > 0, q > 0)
    kl = np.sum(p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), axis=1)
    assert (
        np.abs(q.sum(1) - 1).max() < 1e-3
        and kl.mean() < 2e-4
        and not list(verify(Store(tmp_path / "s")))
    )


@pytest.mark.parametrize("masked", [-1e3, -1e9, float(np.finfo(np.float32).min)])
def test_compact_stores_ids_that_the_teacher_masks_as_absent(tmp_path: Path, masked: float) -> None:
    """Ids of probability 0 must not widen the steps of all others."""
    of = spec(profile="compact", top_k=20, temperatures=(1.0, 2.0))
    whole = sample(0, of, 30)
    logits, ids = whole.topk.logits.copy(), whole.topk.ids.copy()
    logits[:, 12:] = masked
    lse = np.stack([np.logaddexp.reduce(logits.astype(np.float64) / t, axis=1) for t in (1, 2)], 1)
    one = with_topk(whole, logits=logits, logsumexp=lse.astype(np.float32))
    logits, ids[:, 12:] = logits.copy(), -1
    logits[:, 12:] = -np.inf
    without = with_topk(one, logits=logits, ids=ids)
    (masking,) = Store(write(tmp_path / "masking", of, [one]))
    (absent,) = Store(write(tmp_path / "absent", of, [without]))
    for values in ("ids", "logits", "logsumexp"):
        assert np.array_equal(getattr(masking.topk, values), getattr(absent.topk, values))
    assert not list(verify(Store(tmp_path / "masking")))


@settings(max_examples=25, deadline=None)
@given(case=cases(), p=st.floats(0.01, 1))
def test_top_p_is_plain_cut_off(case: tuple[StoreSpec, list[Sample]], p: float) -> None:
    of, samples = case
    cut = replace(of, profile="top_p", profile_options={"p": p})
    with TemporaryDirectory() as directory:
        plain = list(Store(write(Path(directory) / "plain", of, samples)))
        read = list(Store(write(Path(directory) / "cut", cut, samples)))
    for whole, now in zip(plain, read, strict=True):
        present = now.topk.ids >= 0
        assert present[:, :1].all() and np.array_equal(present, np.isfinite(now.topk.logits))
        assert np.array_equal(now.topk.ids[present], whole.topk.ids[present])
        assert np.array_equal(now.topk.logits[present], whole.topk.logits[present])
        assert np.array_equal(now.topk.logsumexp, whole.topk.logsumexp)


def log_bucket(read: Sample) -> NDArray[np.float64]:
    """log p of the K, by rising id, and of the rest [A, K + 1]; float64.

    Of the samples as they were, not of a plain store: float16 spoils a small rest.
    """
    order = np.argsort(read.topk.ids, axis=1)
    log_p = read.topk.logits.astype(np.float64) - read.topk.logsumexp[:, :1]
    log_p = np.take_along_axis(log_p, order, 1)
    rest = np.maximum(1 - np.exp(log_p).sum(1, keepdims=True), 1e-30)
    return np.concatenate([log_p, np.log(rest)], axis=1)


@pytest.mark.parametrize("vocab_size", [500, 49_152, 262_144])
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
def test_compact_is_a_faithful_teacher_in_few_bytes(
    tmp_path: Path, vocab_size: int, spread: float
) -> None:
    options = {"vocab_size": vocab_size, "top_k": 100}
    samples = [sample(row, spec(**options), 50, spread=spread) for row in range(4)]
    compact = Store(write(tmp_path / "compact", spec(profile="compact", **options), samples))
    divergences = []
    for was, now in zip(samples, compact, strict=True):
        assert np.array_equal(np.sort(was.topk.ids, 1), np.sort(now.topk.ids, 1))
        p, q = log_bucket(was), log_bucket(now)
        divergences.append((np.exp(q) * (q - p)).sum(1))
    assert np.concatenate(divergences).mean() <= 1e-4
    teacher_bytes = sum(
        info.bytes
        for shard in compact.manifest.parts
        for name, info in shard.files.items()
        if name.endswith(".bin") and name.split(".")[0] not in ("tokens", "loss_mask", "rows")
    )
    assert teacher_bytes / compact.manifest.totals["answer_tokens"] <= 250


def test_plain_takes_404_bytes_an_answer_token(tmp_path: Path) -> None:
    of = spec(vocab_size=65_536, top_k=100)
    read = Store(write(tmp_path / "s", of, [sample(0, of, 200)]))
    files = read.manifest.parts[0].files
    teacher = ("topk_ids.bin", "topk_logits.bin", "lse.bin")
    assert sum(files[name].bytes for name in teacher) == 404 * 200


def test_top_p_keeps_the_fewest_ids_that_hold_p(tmp_path: Path) -> None:
    of = spec(top_k=50)
    samples = [sample(row, of, 20, spread=3.0) for row in range(3)]
    cut = spec(top_k=50, profile="top_p", profile_options={"p": 0.8})
    for was, now in zip(samples, Store(write(tmp_path / "s", cut, samples)), strict=True):
        p = np.exp(was.topk.logits.astype(np.float64) - was.topk.logsumexp)
        kept = np.minimum((p.cumsum(1) < 0.8).sum(1) + 1, 50)
        assert np.array_equal((now.topk.ids >= 0).sum(1), kept)
        for a, count in enumerate(kept):
            assert np.array_equal(now.topk.ids[a, :count], was.topk.ids[a, :count])


def test_sampled_keeps_ids_and_counts_in_few_bytes(tmp_path: Path) -> None:
    draws, vocab_size, answers = 50, 49_152, 100
    of = spec(vocab_size=vocab_size, top_k=draws, profile="sampled")
    rng = np.random.default_rng(0)
    ids = np.full((answers, draws), -1)
    counts = np.zeros((answers, draws), np.int64)
    for a in range(answers):
        values, count = np.unique(rng.zipf(2.5, draws) % vocab_size, return_counts=True)
        order = np.argsort(-count, kind="stable")
        ids[a, : len(values)], counts[a, : len(values)] = values[order], count[order]
    with np.errstate(divide="ignore"):
        logits = np.log(counts / draws).astype(np.float32)
    base = sample(0, of, answers)
    zeros = np.zeros((answers, 1), np.float32)
    drawn = replace(base, topk=TopK(ids=ids, logits=logits, logsumexp=zeros, draws=True))
    read = Store(write(tmp_path / "s", of, [drawn]))
    assert np.array_equal(read[0].topk.ids, ids)
    assert np.array_equal(np.rint(np.exp(read[0].topk.logits) * draws), counts)
    size = read.manifest.parts[0].files["records.bin"].bytes
    assert size < (answers + 3 * (ids >= 0).sum()) / 2  # of a count and whole bytes per id


def test_a_row_without_answers_is_kept_and_counted(tmp_path: Path) -> None:
    of = spec()
    read = Store(write(tmp_path / "s", of, [sample(0, of, 0), sample(1, of, 2)]))
    assert read[0].topk.ids.shape == (0, 5)
    assert read.manifest.totals["samples_without_answer"] == 1


def test_any_order_of_reading(tmp_path: Path) -> None:
    read = Store(store(tmp_path / "s", spec(), rows=7))
    assert [read[i].row for i in (6, 0, 3, -1)] == [6, 0, 3, 6]
    assert read.lengths.tolist() == [4 + row % 4 for row in range(7)]
    with pytest.raises(IndexError):
        read[7]


def test_what_cannot_be_a_teacher_is_refused(tmp_path: Path) -> None:
    of = spec()
    good = sample(0, of, 3)
    broken = {
        "descending order": {"logits": good.topk.logits[:, ::-1]},
        "an id that is neither in": {"ids": good.topk.ids + 500},
        "a logit that is not a number": {"logits": good.topk.logits * np.nan},
        "log-sum-exp is at temperatures": {"temperatures": (2.0,)},
        "TopK.draws=True, but the profile is plain": {"draws": True},
    }
    for message, change in broken.items():
        with pytest.raises(StoreError, match=f"row 0: .*{message}"):
            write(tmp_path / message.replace(" ", "-"), of, [with_topk(good, **change)])
    fewer = replace(good, topk=good.topk[:2])
    with pytest.raises(StoreError, match=r"row 0: topk\.ids is \[2, 5\], expected \[3, 5\]"):
        write(tmp_path / "fewer", of, [fewer])
    unknown = with_topk(good, logsumexp=None)
    with pytest.raises(StoreError, match=r"row 0: topk\.logsumexp is \[\], expected \[3, 1\]"):
        write(tmp_path / "unknown", of, [unknown])


def test_a_single_log_sum_exp_may_be_a_vector(tmp_path: Path) -> None:
    one = sample(0, spec(), 3)
    vector = replace(one, topk=one.topk.at(1.0))
    assert vector.topk.logsumexp.shape == (3,)
    (now,) = Store(write(tmp_path / "s", spec(), [vector]))
    assert np.array_equal(now.topk.logsumexp, one.topk.logsumexp)
