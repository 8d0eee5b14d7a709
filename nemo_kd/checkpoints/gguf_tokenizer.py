"""The byte-level BPE tokenizer inside a GGUF file, as a transformers tokenizer.

transformers' own loader swaps the begin- and end-of-sequence ids and omits padding; this one takes
every special id from the file. Pre-tokenization follows `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nemo_kd.checkpoints.model import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

Field = Callable[..., Any]
"""`field(key, default=None)` is a metadata value of the file."""

# GGUF's token types.
CONTROL, USER_DEFINED = 3, 4
SPECIAL_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def build_tokenizer(name: str, field: Field) -> PreTrainedTokenizerFast:
    """The tokenizer of the file `name`, with its special ids and chat template."""
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = field("tokenizer.ggml.tokens")
    special = {
        token: tokens[field(key)] for token, key in SPECIAL_IDS.items() if field(key) is not None
    }
    if "eos_token" not in special:
        raise CheckpointError(f"{name} has no end-of-sequence id; SFT needs one")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(name, field, tokens),
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = field("tokenizer.chat_template")
    return tokenizer


def _backend(name: str, field: Field, tokens: list[str]) -> Tokenizer:
    """The tokenizer without special ids; raises the errors of `build_tokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    model = field("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f"{name}: tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') is "
            "supported in a GGUF; convert the model's Hugging Face directory instead"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    backend = Tokenizer(BPE(vocab, merges))
    backend.pre_tokenizer = _pre_tokenizer(name, field)
    backend.decoder = decoders.ByteLevel()
    types = field("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, types, strict=False):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend


def _pre_tokenizer(name: str, field: Field) -> PreTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    words = ByteLevel(add_prefix_space=False, use_regex=True)
    known = {"gpt-2": words, "smollm": Sequence([Digits(individual_digits=True), words])}
    kind = field("tokenizer.ggml.pre", "gpt-2")
    if kind not in known:
        raise CheckpointError(
            f"{name}: tokenizer.ggml.pre is {kind!r}; supported are {', '.join(sorted(known))}; "
            "convert the model's Hugging Face directory instead"
        )
    return known[kind]
