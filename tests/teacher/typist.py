"""A tiny Hugging Face teacher whose answers are random characters, with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TYPIST = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def characters() -> PreTrainedTokenizerFast:
    """A token for each printable character except the space: any ids survive a round trip."""
    tokens = ["</s>", *map(chr, range(33, 127))]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.add_special_tokens(["</s>"])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def write_typist(directory: Path) -> None:
    """Write a random model over `characters`; a third of its answers end within 40 tokens."""
    torch.manual_seed(5)
    config = LlamaConfig(**TYPIST, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(directory)
    characters().save_pretrained(directory)
