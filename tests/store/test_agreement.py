"""Labels against the teacher's rows: the figures are the plain sums, and warn of what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemo_kd.store import Sample, StoreSpec
from nemo_kd.store.tools.agreement import Agreement
from nemo_kd.topk import TopK
from tests.store.samples import each_array, with_topk

V, K = 120, 20
SPEC = StoreSpec(top_k=K, vocab_size=V)
DRAWN = StoreSpec(top_k=K, vocab_size=V, profile="sampled")
Dense = NDArray[np.float64]


def distributions(answers: int, spread: float, seed: int = 0) -> Dense:
    """[A, V]: softmax of normal logits; large spreads are sure teachers."""
    z = np.random.default_rng(seed).normal(0, spread, (answers, V))
    return np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))


def labels_of(p: Dense, seed: int = 1) -> NDArray[np.int64]:
    """A draw from each distribution."""
    u = np.random.default_rng(seed).random((len(p), 1))
    return (p.cumsum(1) < u).sum(1).clip(max=V - 1)


def sample(p: Dense, labels: NDArray[np.int64], row: int = 0) -> Sample:
    """Three prompt tokens, then the labels; the top K of `p`."""
    ids = np.argsort(-p, axis=1)[:, :K]
    input_ids = np.concatenate([[1, 2, 3], labels]).astype(np.int32)
    mask = np.array([0] * 3 + [1] * len(labels), np.uint8)
    logits = np.log(np.take_along_axis(p, ids, 1)).astype(np.float32)
    zeros = np.zeros((len(p), 1), np.float32)
    return Sample(row, input_ids, mask, TopK(ids=ids, logits=logits, logsumexp=zeros))


def drawn(one: Sample, p: Dense, seed: int = 2) -> Sample:
    """K evenly spaced draws of each distribution, as a dump takes them."""
    u = np.random.default_rng(seed).random(len(p))
    points = (np.arange(K) + u[:, None]) / K
    counts = np.zeros((len(p), V))
    for a, row in enumerate(p.cumsum(1)):
        np.add.at(counts[a], np.searchsorted(row, points[a]).clip(max=V - 1), 1)
    ids = np.argsort(-counts, axis=1, kind="stable")[:, :K]
    with np.errstate(divide="ignore"):
        logits = np.log(np.take_along_axis(counts, ids, 1) / K).astype(np.float32)
    return with_topk(one, ids=np.where(np.isfinite(logits), ids, -1), logits=logits)


def agreement(*samples: Sample, of: StoreSpec = SPEC) -> Agreement:
    return reduce(add, (Agreement.of_sample(one, of) for one in samples))


def shifted(one: Sample, by: int) -> Sample:
    """Each token's row is that of the token `by` before it."""
    return each_array(one, lambda rows: np.roll(rows, by, 0))


def test_sums_are_the_plain_ones() -> None:
    p = distributions(40, 2.0)
    labels = labels_of(p)
    labels[::3] = p[::3].argmax(1)
    made = [sample(p[:15], labels[:15]), sample(p[15:], labels[15:]), sample(p[:0], labels[:0])]
    total = agreement(*made)
    agreed, expected, surprise, entropy, before, after = 0, 0.0, 0.0, 0.0, 0, 0
    for a, one in enumerate(p):
        f = -np.log(one)
        order = np.argsort(-one)
        rest = one[order[K:]].sum()
        f[order[K:]] = -np.log(min(one[order[K - 1]], rest))
        surprise, entropy = surprise + f[labels[a]], entropy + (one * f).sum()
        agreed, expected = agreed + int(order[0] == labels[a]), expected + one.max()
        previous = labels[a - 1] if a not in (0, 15) else 3
        following = labels[a + 1] if a not in (14, 39) else -1
        before, after = before + int(order[0] == previous), after + int(order[0] == following)
    assert (total.tokens, total.agreed, total.earlier, total.later) == (40, agreed, before, after)
    assert total.expected == pytest.approx(expected, rel=1e-6)
    assert total.surprise == pytest.approx(surprise, rel=1e-6)
    assert total.entropy == pytest.approx(entropy, rel=1e-6)
    assert total.to_json()["agreement"] == round(agreed / 40, 4)
    perplexity = np.exp(surprise / 40)
    assert total.to_json()["perplexity_of_labels"] == pytest.approx(perplexity, abs=1e-3)
    assert f"perplexity of the labels {perplexity:.2f}" in str(total)


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
def test_the_teachers_own_draws_are_what_it_expects(spread: float) -> None:
    p = distributions(4000, spread)
    labels = labels_of(p)
    top = agreement(sample(p, labels))
    assert abs(top.agreed - top.expected) < 4 * np.sqrt(top.variance)
    assert abs(top.surprise - top.entropy) < 4 * np.sqrt(top.surprise_squares)
    draws = agreement(drawn(sample(p, labels), p), of=DRAWN)
    collision = (p**2).sum()
    assert abs(draws.agreed - collision) < 4 * np.sqrt(draws.variance + 1)
    assert collision * 0.5 - 4000 / K < draws.expected <= collision * 1.02
    assert "perplexity" not in str(draws) and draws.to_json()["perplexity_of_labels"] is None


@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 10])
def test_draws_without_a_repeated_id_expect_no_agreement(top_k: int) -> None:
    """Each id was drawn once: float32 rounds its 1/K to below or above 1/K."""
    answers = 40
    p = distributions(answers, 0.1)
    ids = np.tile(np.arange(top_k), (answers, 1))
    logits = np.full(ids.shape, -np.log(top_k), np.float32)
    one = with_topk(sample(p, labels_of(p)), ids=ids, logits=logits)
    for nudge in (-1.0, 0.0, 1.0):
        nudged = with_topk(one, logits=np.nextafter(logits, np.float32(nudge * 99)))
        of = StoreSpec(top_k=top_k, vocab_size=V, profile="sampled")
        total = agreement(nudged, of=of)
        assert 0 <= total.expected < 1e-4 and total.variance >= 0
        assert isinstance(total.warning(), str)
        assert "-0.0" not in f"{total}{total.to_json()}"


def test_a_teacher_that_is_sure_has_no_negative_variance() -> None:
    """float32 rounds a probability of 1 to above it."""
    one = sample(p := distributions(40, 3.0), greedy(p))
    logits = np.full(one.topk.logits.shape, -np.inf, np.float32)
    logits[:, 0] = 1e-7
    total = agreement(with_topk(one, logits=logits))
    assert total.variance >= 0 and isinstance(total.warning(), str)


def greedy(p: Dense) -> NDArray[np.int64]:
    return p.argmax(1)


def human(p: Dense) -> NDArray[np.int64]:
    """Less predictable than the teacher thinks: drawn at temperature 1.3."""
    flat = p ** (1 / 1.3)
    return labels_of(flat / flat.sum(1, keepdims=True))


def one_in_five_wrong(p: Dense) -> NDArray[np.int64]:
    right = np.random.default_rng(3).random(len(p)) < 0.8
    return np.where(right, p.argmax(1), (p.argmax(1) + 7) % V)


def unrelated(p: Dense) -> NDArray[np.int64]:
    return np.random.default_rng(4).integers(0, V, len(p))


GOOD: dict[str, tuple[float, Callable[[Dense], NDArray[np.int64]]]] = {
    "its own draws": (3.0, labels_of),
    "its own best tokens": (3.0, greedy),
    "a weak teacher": (2.5, human),
    "a sure teacher on human text": (4.0, human),
}


@pytest.mark.parametrize("profile", ["top-K", "draws"])
@pytest.mark.parametrize("kind", GOOD)
def test_ordinary_teachers_are_not_warned_of_but_shifted_ones_are(kind: str, profile: str) -> None:
    spread, labels = GOOD[kind]
    p = distributions(1500, spread)
    one, of = sample(p, labels(p)), SPEC
    if profile == "draws":
        one, of = drawn(one, p), DRAWN
    assert agreement(one, of=of).warning() == ""
    for by, where in ((1, "before"), (-1, "after")):
        warning = agreement(shifted(one, by), of=of).warning()
        assert f"shifted by one position: each predicts the token {where} its label" in warning
        assert "the label for" in warning and "% expected)" in warning


BAD: dict[str, tuple[float, Callable[[Dense], NDArray[np.int64]], str]] = {
    "another row's labels": (3.0, unrelated, "below 10%: check that data.prompt_template"),
    "sure and often wrong": (30.0, one_in_five_wrong, "the teacher does not predict these labels"),
    "an untrained teacher": (0.05, labels_of, "below 10%"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_the_teacher_would_not_say_is_warned_of(kind: str) -> None:
    spread, labels, message = BAD[kind]
    p = distributions(1500, spread)
    assert message in agreement(sample(p, labels(p))).warning()


def test_a_teacher_of_other_tokens_is_warned_of_though_it_agrees_at_times() -> None:
    """Its rows are near uniform; every sixth label happens to be its best token."""
    p = distributions(600, 0.05)
    labels = unrelated(p)
    labels[::6] = p[::6].argmax(1)
    assert "own perplexity is above 100" in agreement(sample(p, labels)).warning()


def test_rows_of_which_a_third_are_shifted_surprise() -> None:
    p = distributions(900, 6.0)
    one = sample(p, labels_of(p))
    moved, third = shifted(one, 1), np.arange(len(p)) // 50 % 3 == 0
    mixed = with_topk(
        one,
        ids=np.where(third[:, None], moved.topk.ids, one.topk.ids),
        logits=np.where(third[:, None], moved.topk.logits, one.topk.logits),
    )
    assert agreement(one).warning() == ""
    assert "the teacher does not predict these labels" in agreement(mixed).warning()


@pytest.mark.parametrize("tokens", [0, 1, 3, 6])
def test_a_few_tokens_say_nothing(tokens: int) -> None:
    p = distributions(tokens, 2.0)
    for labels in (unrelated(p), greedy(p), labels_of(p)):
        one = sample(p, labels)
        for by in (-1, 0, 1):
            found: Any = agreement(shifted(one, by))
            assert found.warning() == "" and str(found)
