"""Tokenizers of the tests of rows."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nemo_kd.sft.tokenizer import HFTokenizer


@cache
def gpt2_like() -> HFTokenizer:
    """Bytes split as GPT-2's; two newlines are one token, and so are an answer's own letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "Ċ"
    vocabulary = {letter: i for i, letter in enumerate([*letters, newline * 2])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return saved(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))


@cache
def with_bos() -> HFTokenizer:
    """The same with a token that it puts before every text that it is called with, as Llama 3's."""
    tokenizer = Tokenizer.from_str(gpt2_like().tokenizer.backend_tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True)])
    special = [("<bos>", tokenizer.token_to_id("<bos>"))]
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, special)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return saved(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens))


def saved(tokenizer: PreTrainedTokenizerFast) -> HFTokenizer:
    """The tokenizer as it is after saving and loading it."""
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(Path(directory))
        return HFTokenizer(directory)
