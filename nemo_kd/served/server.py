"""What a server tells about itself: the models it serves, and its tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from nemo_kd.served.answer import NOT_JSON
from nemo_kd.served.client import Client, ServedTeacherError, StatusError
from nemo_kd.sft.tokenizer import HFTokenizer
from nemo_kd.teacher.config import TeacherConfig

RETRIES_AT_START = 2
"""Retries of the first request: an error in the address should show soon."""
TOKENIZE_SECONDS = 10.0
"""Longest wait for the server's tokenizer, which need not be told."""
PROBE = "def f(x):\n    return {'naïve café': 12345.67}  # 日本語, żółć 🙂\n"
"""Text whose tokens differ between most tokenizers."""


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


class _Tokens(msgspec.Struct):
    tokens: list[int]


@dataclass(frozen=True)
class Server:
    """The served model's name, and the maximum number of tokens per row; None if not known."""

    model: str
    max_row: int | None


async def describe(
    config: TeacherConfig, tokenizer: HFTokenizer, say: Callable[[str], None]
) -> Server:
    """Ask `/v1/models` for the model and its context, and compare the server's tokenizer.

    Raises ServedTeacherError if `teacher.model` is not served, is not given where several are, or
    if `/tokenize`, which a server may lack, gives other tokens than `tokenizer`. Prints a line if
    it gives none.
    """
    async with Client(config, say, min(config.retries, RETRIES_AT_START)) as client:
        card = _chosen(config, await _models(client, config))
    async with Client(config, say, retries=0) as client:
        await _compare_tokenizers(client, card.id, tokenizer)
    # The servers reserve a position for a generated token.
    return Server(card.id, None if card.max_model_len is None else card.max_model_len - 1)


async def _models(client: Client, config: TeacherConfig) -> list[_Card]:
    try:
        content = await client.get("/v1/models")
    except StatusError as error:
        if error.status == 404 and config.model is not None:
            return [_Card(config.model)]
        raise
    try:
        return msgspec.json.decode(content, type=_Models).data
    except NOT_JSON as error:
        raise ServedTeacherError(
            f"{client.url}/v1/models is not a list of models as in OpenAI's API ({error}); check "
            "teacher.url"
        ) from None


def _chosen(config: TeacherConfig, cards: list[_Card]) -> _Card:
    names = ", ".join(card.id for card in cards) or "none"
    if config.model is None:
        if len(cards) != 1:
            raise ServedTeacherError(
                f"teacher.model must be given, because the server lists: {names}"
            )
        return cards[0]
    for card in cards:
        if card.id == config.model:
            return card
    raise ServedTeacherError(f"teacher.model={config.model} is not served; the server has: {names}")


async def _compare_tokenizers(client: Client, model: str, tokenizer: HFTokenizer) -> None:
    body = {"model": model, "prompt": PROBE, "add_special_tokens": False}
    try:
        async with asyncio.timeout(TOKENIZE_SECONDS):
            content = await client.post("/tokenize", body)
        theirs = msgspec.json.decode(content, type=_Tokens).tokens
    except (ServedTeacherError, TimeoutError, *NOT_JSON) as error:
        client.say(
            f"{client.url}/tokenize: the server does not tell its tokenizer ({_reason(error)}), so "
            "teacher.tokenizer is not compared: check that it is the served model's"
        )
        return
    if theirs != (ours := tokenizer.text_to_ids(PROBE)):
        raise ServedTeacherError(
            f"the server's tokenizer is another one: {PROBE!r} has the ids {theirs[:8]}... there, "
            f"{ours[:8]}... with teacher.tokenizer; set it to the served model's tokenizer"
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, StatusError):
        return f"status {error.status}"
    if isinstance(error, TimeoutError):
        return f"no answer within {TOKENIZE_SECONDS:g} s"
    return str(error.__cause__ if isinstance(error, ServedTeacherError) else error)
