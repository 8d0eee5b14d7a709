"""Tokenizers and templates for tests of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nemo_kd.sft.chat import ChatTemplate
from nemo_kd.sft.messages import conversation_of

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = {
    "alpaca": ["</s>"],
    "cohere": [
        *("<BOS>", "<|START|>", "<|END|>", "<|SYSTEM|>", "<|USER|>", "<|CHATBOT|>"),
        *("<|RESPONSE|>", "<|END_RESPONSE|>"),
    ],
    "deepseek": [
        "<｜begin▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
    ],
    "ends_once": ["</s>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "generation": ["<|im_start|>", "<|im_end|>"],
    "generation_no_end": ["<|im_start|>", "<|im_end|>"],
    "harmony": [
        *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
    ],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": [
        *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
        *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"],
}
BOS = {
    "cohere": "<BOS>",
    "deepseek": "<｜begin▁of▁sentence｜>",
    "gemma": "<bos>",
    "llama3": "<|begin_of_text|>",
    "mistral": "<s>",
}
EOS = {
    "deepseek": "<｜end▁of▁sentence｜>",
    "mistral": "</s>",
    "alpaca": "</s>",
    "ends_once": "</s>",
}


class Fast:
    """A tokenizer of transformers with the interface of `nemo_kd.sft.tokenizer.Tokenizer`."""

    vocab_size, bos_id, eos_id, space_sensitive = 0, None, None, False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def text_to_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids_to_text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(ids))


class Slow(Fast):
    """Without offsets."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._fast, self.tokenizer = tokenizer, None

    def text_to_ids(self, text: str) -> list[int]:
        return list(self._fast(text, add_special_tokens=False)["input_ids"])


def single_bytes(name: str) -> Any:
    """A tokenizer with one token per byte and the special tokens of a template."""
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends: dict[str, Any] = {"bos_token": BOS.get(name), "eos_token": EOS.get(name)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL.get(name, [])})
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


def chat_template(name: str, **settings: Any) -> ChatTemplate:
    """A template of `templates/` over single bytes."""
    tokenizer = single_bytes(name)
    settings = {"max_seq_length": 1 << 30, **settings}
    return ChatTemplate(tokenizer=Fast(tokenizer), template=tokenizer.chat_template, **settings)


def shown(chat: ChatTemplate, row: dict[str, Any]) -> str:
    """The text of a row's tokens, with the learned parts in ⟦⟧."""
    made = chat(conversation_of(row))
    pairs = zip(made.input_ids, made.loss_mask.tolist(), strict=True)
    parts = []
    for mask, run in groupby(pairs, key=lambda pair: pair[1]):
        text = chat.tokenizer.ids_to_text([token for token, _ in run])
        parts.append(f"⟦{text}⟧" if mask else text)
    return "".join(parts)


def learned(chat: ChatTemplate, row: dict[str, Any]) -> list[str]:
    """The text of each learned part of a row."""
    return [part.partition("⟧")[0] for part in shown(chat, row).split("⟦")[1:]]


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "a1", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "a1"}
