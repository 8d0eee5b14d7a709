"""SGLang's `/generate` with `return_logprob` and `top_logprobs_num`.

With `logprob_start_len` 0, `meta_info` has two lists with an entry per token:
`input_token_logprobs`, whose first log-probability is null, and `input_top_logprobs`, whose first
entry is null; an item is [log-probability, id, text]. -inf is null. The format is that of SGLang's
`python/sglang/srt/managers/tokenizer_manager.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from nemo_kd.served.answer import NOT_JSON, Answer, AnswerError, Candidates


class _Item(msgspec.Struct, array_like=True):
    logprob: float | None
    id: int


class _Meta(msgspec.Struct):
    input_token_logprobs: list[_Item] | None = None
    input_top_logprobs: list[list[_Item] | None] | None = None
    prompt_tokens: int | None = None
    finish_reason: Any = None


class _Generated(msgspec.Struct):
    meta_info: _Meta


class SGLang:
    """Implementation of `answer.Wire`."""

    path = "/generate"
    limit_option = ""
    cache_option = "--disable-radix-cache"

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_Generated)

    def request(self, model: str, tokens: Sequence[int], top_k: int) -> Mapping[str, Any]:
        return {
            "input_ids": list(tokens),
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": False,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        }

    def parse(self, content: bytes) -> Answer:
        try:
            meta = self._decoder.decode(content).meta_info
        except NOT_JSON as error:
            raise AnswerError(f"the answer is not in the format of SGLang: {error}") from None
        own, top = meta.input_token_logprobs, meta.input_top_logprobs
        if own is None or top is None:
            raise AnswerError(
                "the answer has no input_top_logprobs: the server does not support them, it ended "
                f"the request ({meta.finish_reason}), or teacher.api is not its format"
            )
        if len(own) != len(top):
            raise AnswerError(
                f"the answer has {len(own)} input_token_logprobs and {len(top)} input_top_logprobs"
            )
        positions = [None if t is None else (o, t) for o, t in zip(own, top, strict=True)]
        return Answer(positions, [item.id for item in own], meta.prompt_tokens)

    def candidates(self, position: tuple[_Item, list[_Item]], token: int) -> Candidates:
        own, top = position
        return Candidates([item.id for item in top], [_value(item) for item in top], _value(own))


def _value(item: _Item) -> float:
    return -math.inf if item.logprob is None else item.logprob
