"""Tokens of a text and the mask of its learned spans, with fast and slow tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nemo_kd.sft import RowError
from nemo_kd.sft.spans import encode_spans
from tests.checkpoints import models
from tests.sft.chats import Fast, Slow


def byte_level(*, trim: bool = False) -> Any:
    """Byte-level BPE; `trim` leaves leading spaces out of the offsets, as Llama 3's does."""
    tokenizer = models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<e>"]})
    tokenizer.add_tokens(["\n\n", "\n   "])
    if trim:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def sentence_piece() -> Any:
    """As Llama 2's: a space before each segment, byte fallback, no splitting before BPE."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["<unk>", "▁", "a", "b", "▁a", "▁▁", "ab", "▁ab", *bytes_]
    merges = [("▁", "a"), ("▁", "▁"), ("a", "b"), ("▁", "ab")]
    backend = Tokenizer(
        BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<e>"]})
    return tokenizer


FAST = {"bytes": byte_level(), "trimmed": byte_level(trim=True), "pieces": sentence_piece()}


def learned(tokenizer: Any, text: str, *spans: tuple[int, int]) -> list[str]:
    """The tokens with mask 1."""
    made = encode_spans(tokenizer, text, spans)
    return [
        token
        for token, mask in zip(tokenizer.ids_to_tokens(made.input_ids), made.loss_mask, strict=True)
        if mask
    ]


def span(text: str, part: str) -> tuple[int, int]:
    start = text.index(part)
    return start, start + len(part)


@pytest.mark.parametrize("name", FAST)
@given(
    before=st.text("ab é😀\n\r\tش", max_size=9),
    inside=st.text("ab é😀\n\r\tش", max_size=9),
    after=st.text("ab é😀\n\r\tش", max_size=9),
)
def test_spans_between_special_tokens_are_learned_exactly(
    name: str, before: str, inside: str, after: str
) -> None:
    tokenizer = Fast(FAST[name])
    text = f"{before}<e>{inside}<e>{after}"
    start = len(before) + 3
    made = encode_spans(tokenizer, text, [(start, start + len(inside) + 3)])
    ids = [i for i, mask in zip(made.input_ids, made.loss_mask, strict=True) if mask]
    assert list(made.input_ids) == FAST[name](text, add_special_tokens=False)["input_ids"]
    assert ids == FAST[name](f"{inside}<e>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAST)
def test_all_tokens_of_a_character_are_learned_together(name: str) -> None:
    text = "<e>😀<e>"
    assert len(learned(Fast(FAST[name]), text, span(text, "😀"))) in (4, 5)  # 5: with a "▁" before


@pytest.mark.parametrize("name", ["bytes", "trimmed"])
def test_a_token_that_joins_two_parts_is_divided(name: str) -> None:
    tokenizer = Fast(FAST[name])
    assert learned(tokenizer, "a\n\nb<e>", (2, 4)) == ["Ċ", "b"]
    assert learned(tokenizer, "a\n   b<e>", (2, 9)) == ["ĠĠ", "Ġ", "b", "<e>"]
    assert learned(tokenizer, "<e>a\n\nb", (3, 5)) == ["a", "Ċ"]


def test_words_are_divided_too() -> None:
    """Without splitting into words, and with a space before each text that is not one's own."""
    tokenizer = Fast(FAST["pieces"])
    assert learned(tokenizer, "aab", (2, 3)) == ["b"]
    assert learned(tokenizer, "aab", (0, 2)) == ["▁a", "a"]


def test_a_leading_space_belongs_to_the_word_that_follows() -> None:
    """Also where the offsets leave it out."""
    for name in ("bytes", "trimmed"):
        text = "<e>s c<e>"
        assert learned(Fast(FAST[name]), text, span(text, " c")) == ["Ġc"]


SPACES = st.text(st.sampled_from("ab \n\t"), max_size=40)


@given(before=SPACES, inside=SPACES, after=SPACES)
def test_a_text_is_tokenized_in_parts_only_where_a_token_joins_them(
    before: str, inside: str, after: str
) -> None:
    """By definition: as one text if its tokens end where the span does, otherwise in parts."""
    tokenizer = Fast(FAST["bytes"])
    text = f"<e>{before}{inside}{after}"
    start, stop = len(before) + 3, len(before) + 3 + len(inside)
    made = encode_spans(tokenizer, text, [(start, stop)] if inside else [])
    whole = FAST["bytes"](text, add_special_tokens=False, return_offsets_mapping=True)
    ends = (start, stop) if inside else ()
    if any(a < end < b for a, b in whole["offset_mapping"] for end in ends):
        parts = (text[:start], inside, after)
        assert list(made.input_ids) == [i for part in parts for i in tokenizer.text_to_ids(part)]
    else:
        assert list(made.input_ids) == whole["input_ids"]
    learned_ids = [i for i, mask in zip(made.input_ids, made.loss_mask, strict=True) if mask]
    assert tokenizer.ids_to_text(learned_ids) == inside


def test_empty_spans_learn_nothing() -> None:
    assert learned(Fast(FAST["bytes"]), "ab", (1, 1), (2, 2)) == []
    assert not len(encode_spans(Fast(FAST["bytes"]), "", []).input_ids)


def test_a_special_token_that_swallows_whitespace() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<end>", rstrip=True, special=True, normalized=False)])
    text = "a<end>\n<end>\n  a"
    assert learned(Fast(tokenizer), text, (0, 6)) == ["a", "<end>"]
    assert learned(Fast(tokenizer), text, (13, 16)) == ["Ġ", "Ġa"]


def test_a_special_token_is_never_divided() -> None:
    with pytest.raises(RowError, match="ends inside the token '<e>'"):
        encode_spans(Fast(FAST["bytes"]), "a<e>b", [(2, 5)])


def test_lone_surrogates_are_an_error() -> None:
    for tokenizer in (Fast(FAST["bytes"]), Slow(FAST["bytes"])):
        with pytest.raises(RowError, match="lone surrogate"):
            encode_spans(tokenizer, "a\ud83d", [(0, 1)])


def test_without_offsets_spans_are_found_by_prefixes() -> None:
    text = "a b<e>a é😀\n<e>b"
    spans = [span(text, "a é😀\n<e>")]
    slow = encode_spans(Slow(FAST["bytes"]), text, spans)
    fast = encode_spans(Fast(FAST["bytes"]), text, spans)
    assert list(slow.input_ids) == list(fast.input_ids)
    assert slow.loss_mask.tolist() == fast.loss_mask.tolist()


def test_without_offsets_a_joined_token_is_divided() -> None:
    made = encode_spans(Slow(FAST["bytes"]), "a\n\nb", [(2, 4)])
    assert FAST["bytes"].convert_ids_to_tokens(made.input_ids) == ["a", "Ċ", "Ċ", "b"]
    assert made.loss_mask.tolist() == [0, 0, 1, 1]


def test_a_million_characters() -> None:
    text = "<e>" + "ab é" * 250_000 + "<e>"
    made = encode_spans(Fast(FAST["bytes"]), text, [(3, len(text))])
    assert made.loss_mask.tolist() == [0] + [1] * (len(made.input_ids) - 1)
