"""The byte-level BPE tokenizer inside a GGUF file, as a transformers tokenizer.

transformers' own loader swaps begin- and end-of-sequence ids and leaves padding out; here every
special id is the one that the file states. Pre-tokenization follows `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_kd.checkpoints.llama import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

    from nemo_kd.checkpoints.gguf_file import GGUFCheckpoint

# GGUF's token types.
CONTROL, USER_DEFINED = 3, 4
SPECIAL_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def build_tokenizer(file: GGUFCheckpoint) -> PreTrainedTokenizerFast:
    """The tokenizer of `file`, with its special ids and chat template."""
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = file.field("tokenizer.ggml.tokens")
    special = {
        name: tokens[file.field(key)]
        for name, key in SPECIAL_IDS.items()
        if file.field(key) is not None
    }
    if "eos_token" not in special:
        raise CheckpointError(f"{file.name} states no end-of-sequence id; SFT needs one")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(file, tokens),
        model_max_length=file.llama.context,
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = file.field("tokenizer.chat_template")
    return tokenizer


def _backend(file: GGUFCheckpoint, tokens: list[str]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    model = file.field("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f"{file.name}: tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') is "
            "rebuilt from a GGUF; convert the model's Hugging Face directory instead"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    backend = Tokenizer(BPE(vocab, merges))
    backend.pre_tokenizer = _pre_tokenizer(file)
    backend.decoder = decoders.ByteLevel()
    types = file.field("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, types, strict=False):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend


def _pre_tokenizer(file: GGUFCheckpoint) -> PreTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    words = ByteLevel(add_prefix_space=False, use_regex=True)
    known = {"gpt-2": words, "smollm": Sequence([Digits(individual_digits=True), words])}
    name = file.field("tokenizer.ggml.pre", "gpt-2")
    if name not in known:
        raise CheckpointError(
            f"{file.name}: tokenizer.ggml.pre is {name!r}; rebuilt are {', '.join(sorted(known))}; "
            "convert the model's Hugging Face directory instead"
        )
    return known[name]
