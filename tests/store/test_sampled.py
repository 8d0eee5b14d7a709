"""The encoding of draws: every id and count comes back, to the bit, or the bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.codecs.base import Codec
from nemo_kd.teacher.select import Selection
from nemo_kd.topk import TopK
from tests.store.samples import spec

VOCABULARIES = (1, 2, 7, 8, 9, 64, 65, 500, 49_152, 65_536, 151_936, 262_144, 1 << 32)


def codec(vocab_size: int, draws: int) -> Codec:
    return codec_of(spec(vocab_size=vocab_size, top_k=draws, profile="sampled"))


def topk(drawn: list[dict[int, int]], draws: int) -> TopK:
    """The `TopK` of tokens of which each has its ids' counts."""
    ids = np.full((len(drawn), draws), -1)
    logits = np.full(ids.shape, -np.inf, np.float32)
    for a, counts in enumerate(drawn):
        pairs = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        ids[a, : len(pairs)] = [v for v, _ in pairs]
        logits[a, : len(pairs)] = np.log([count / draws for _, count in pairs])
    zeros = np.zeros((len(drawn), 1), np.float32)
    return TopK(ids=ids, logits=logits, logsumexp=zeros, draws=True)


@st.composite
def samples(draw: st.DrawFn) -> tuple[int, int, list[dict[int, int]]]:
    """V, K and the counts of each token's ids, which often lie at a change of their digits."""
    vocab_size = draw(st.sampled_from(VOCABULARIES))
    draws = min(vocab_size, draw(st.sampled_from((1, 2, 3, 6, 24, 40, 127, 128, 255))))
    edges = [edge + i for edge in (8**d for d in range(12)) for i in (-1, 0)]
    last = vocab_size - 1
    one_id = st.integers(0, last) | st.sampled_from([i for i in edges if i < last] or [0])
    tokens = []
    for _ in range(draw(st.integers(0, 5))):
        ids = draw(st.lists(one_id | st.just(last), min_size=1, max_size=draws, unique=True))
        cuts = draw(st.sets(st.integers(1, draws - 1), max_size=len(ids) - 1)) if draws > 1 else ()
        ends = [0, *sorted(cuts), draws]
        tokens.append({v: b - a for v, a, b in zip(ids, ends, ends[1:], strict=False)})
    return vocab_size, draws, tokens


@settings(deadline=None)
@given(samples())
def test_what_was_drawn_is_read(case: tuple[int, int, list[dict[int, int]]]) -> None:
    vocab_size, draws, tokens = case
    of, written = codec(vocab_size, draws), topk(tokens, draws)
    read = of.decode(of.encode(written), len(tokens))
    assert read.draws and read.ids.dtype == np.int64 and not read.logsumexp.any()
    assert np.array_equal(read.ids, written.ids) and np.array_equal(read.logits, written.logits)


def bits(*parts: str) -> NDArray[np.uint8]:
    """The first bit of the text is the least significant of the first byte."""
    text = "".join(parts).replace(" ", "")
    return np.packbits([int(bit) for bit in text], bitorder="little")


def test_the_bits_are_those_of_the_format() -> None:
    """V = 500: ids of 9 bits, of at most 3 octal digits. K = 7."""
    first, second = {5: 4, 400: 1, 9: 2}, {77: 7}
    lengths = "10 10 10", "0 0 10"
    exponents = "01", "1"  # of the counts 2 and 1 of the ids 9 and 400
    fields = "101", "100100 0", "000010011", "101100100"  # 5; 9 and its count; 400; 77
    (records,) = codec(500, 7).encode(topk([first, second], 7)).values()
    assert np.array_equal(records, bits(*lengths, *exponents, *fields))


@settings(deadline=None)
@given(
    st.sampled_from(VOCABULARIES),
    st.integers(1, 255),
    st.integers(0, 4),
    st.binary(max_size=60) | st.lists(st.sampled_from([0, 1, 8, 36, 73]), max_size=60).map(bytes),
)
def test_any_bytes_are_draws_or_refused(v: int, draws: int, answers: int, data: bytes) -> None:
    draws = min(v, draws)
    try:
        read = codec(v, draws).decode({"records": np.frombuffer(data, np.uint8)}, answers)
    except ValueError:
        return
    present = read.ids >= 0
    counts = np.rint(np.exp(read.logits) * draws)
    assert read.ids.shape == (answers, draws) and (read.ids < v).all()
    assert np.array_equal(counts > 0, present) and (counts.sum(axis=1) == draws).all()


@pytest.mark.parametrize(
    ("answers", "lengths", "rest", "message"),
    [
        (1, "1111 1111", "", "do not have the ids of 1 tokens"),
        (2, "0 0 0 10 0 0", "000", "rows of 0 to 1 ids"),
        (2, "111111111 0 0 0 10 0 0", "1" * 40, "rows of 1 to 9 ids"),
        (1, "110 0 0", "0000000", "do not have the counts of 2 ids"),
        (1, "1110 0 0", "0001 1" + "0" * 12, "a token of more than 7 draws"),  # n = 3: at least 8
        (1, "110 0 0", "001 000 001 11", "more than 7 draws, or an id"),  # 4 + 3 leave none for 0
        (1, "0 0 10", "001 111 111", "or an id beyond the vocabulary"),  # 511
        (1, "10 0 0", "000 00000", "2 bytes for fields that end at bit 7"),
        (1, "10 0 0", "001 1", "bits after the last field"),
        (1, "0 10 0", "111000", "start with a digit 0"),
        (1, "110 0 0", "1 010 100", "ids that do not ascend"),
        (1, "110 0 0", "1 010 010", "ids that do not ascend"),
        (1, "10 0 0", "0" * 400, "51 bytes are too many for 1 tokens"),
    ],
)
def test_damaged_bits_are_refused(answers: int, lengths: str, rest: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec(500, 7).decode({"records": bits(lengths, rest)}, answers)


def test_an_id_with_two_counts_is_refused() -> None:
    twice = topk([{4: 7}, {5: 4, 6: 3}], 7)
    twice.ids[1, 1] = 5
    with pytest.raises(StoreError, match="answer token 1: the id 5 twice"):
        codec(500, 7).encode(twice)


def test_counts_that_are_not_of_the_draws_are_refused() -> None:
    with pytest.raises(StoreError, match="needs the counts of 7 draws"):
        codec(500, 7).encode(topk([{5: 3, 6: 3}], 7))


@pytest.mark.parametrize("seed", [1.9, "abc", "3", None, True, -1, [1]])
def test_a_seed_that_is_no_whole_number_makes_no_draws(seed: object) -> None:
    """1.9 would draw as 1 and be recorded as another draw. A store that has it can be read."""
    of = spec(profile="sampled", profile_options={"seed": seed})
    codec_of(of)
    with pytest.raises(StoreError, match=r"profile_options has seed=.* expected a whole number"):
        Selection(of)
