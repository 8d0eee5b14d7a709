"""vLLM's `/v1/completions` with `prompt_logprobs`.

A choice's `prompt_logprobs` has an entry per token: null for the first, then an object from id to
log-probability and rank. It has the K most probable ids and the prompt's own token, which is one
entry more if it is not among them. The format is that of vLLM's
`vllm/entrypoints/openai/completion/protocol.py` (`CompletionResponseChoice`) and
`vllm/logprobs.py`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from nemo_kd.served.answer import NOT_JSON, Answer, AnswerError, Candidates

CLAMPED = -9999.0
"""What vLLM writes for -inf, which JSON does not have."""


class _Logprob(msgspec.Struct):
    logprob: float | None
    rank: int | None = None


class Choice(msgspec.Struct):
    """What an answer says about one prompt."""

    prompt_logprobs: list[dict[int, _Logprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class Usage(msgspec.Struct):
    """Numbers of tokens of a response."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(msgspec.Struct):
    choices: list[Choice]
    usage: Usage | None = None


class VLLM:
    """Implementation of `answer.Wire`."""

    path = "/v1/completions"
    limit_option = "--max-logprobs"
    cache_option = "--no-enable-prefix-caching"

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_Completion)

    def request(self, model: str, tokens: Sequence[int], top_k: int) -> Mapping[str, Any]:
        return {
            "model": model,
            "prompt": list(tokens),
            "prompt_logprobs": top_k,
            "max_tokens": 1,  # vLLM accepts 0 with `echo` only
            "return_token_ids": True,
            # A salt of its own keeps a request from the prefix cache, for which older versions
            # return no log-probabilities, or those of another request.
            "cache_salt": secrets.token_hex(16),
            # Neutral values replace the defaults of the model's generation_config.json, in case
            # the server returns log-probabilities after processing.
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def parse(self, content: bytes) -> Answer:
        try:
            found = self._decoder.decode(content)
        except NOT_JSON as error:
            raise AnswerError(f"the answer is not a completion in vLLM's format: {error}") from None
        if len(found.choices) > 1:
            raise AnswerError(f"the answer has {len(found.choices)} choices: request n=1")
        if not found.choices or found.choices[0].prompt_logprobs is None:
            raise AnswerError(
                "the answer has no prompt_logprobs: the server does not support them, or teacher."
                "api is not its format"
            )
        choice, usage = found.choices[0], found.usage
        positions = found.choices[0].prompt_logprobs
        return Answer(positions, choice.prompt_token_ids, usage.prompt_tokens if usage else None)

    def candidates(self, position: Mapping[int, _Logprob], token: int) -> Candidates:
        values = [_value(each.logprob) for each in position.values()]
        own = position.get(token)
        return Candidates(list(position), values, None if own is None else _value(own.logprob))


def _value(logprob: float | None) -> float:
    return -math.inf if logprob is None or logprob == CLAMPED else logprob
