"""vLLM's responses with `prompt_logprobs`, saved as JSONL: one response per line.

A line is a completion or chat completion, or an object that has it under `response` (or, as
`vllm run-batch` writes it, `response.body`), or an offline `RequestOutput`. The prompt's token ids
are the response's `prompt_token_ids` (request it with `return_token_ids`), or the `prompt` of the
line or of its `request`. Beside them a line may have

    index          row number (the line number if the key is missing)
    loss_mask      [S]  1 for answer tokens, else 0
    prompt_length  number of leading tokens that are no answer tokens

Without a mask or a length all tokens but the first are answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.served.answer import NOT_JSON, Answer, AnswerError, checked
from nemo_kd.served.vllm import VLLM, Choice, Usage
from nemo_kd.sft.rows import Row
from nemo_kd.store import Sample, StoreError, StoreSpec
from nemo_kd.store.checks import checked_tokens
from nemo_kd.store.tools.lines import check_ascending, lines_of, skip_or_raise
from nemo_kd.store.tools.logprobs import Changes
from nemo_kd.store.tools.padding import Padding
from nemo_kd.topk import TopK

MAX_OBJECTS = 1 << 22  # in a line; each kept id has one
SAMPLED_LINES = 32
_WIRE = VLLM()


class _Line(msgspec.Struct):
    index: int | None = None
    loss_mask: list[int] | None = None
    prompt_length: int | None = None
    prompt: Any = None
    request: Any = None
    response: msgspec.Raw = msgspec.Raw()
    body: msgspec.Raw = msgspec.Raw()
    error: Any = None
    prompt_logprobs: msgspec.Raw = msgspec.Raw()
    choices: msgspec.Raw = msgspec.Raw()
    usage: Usage | None = None


_LINE, _TOP = msgspec.json.Decoder(_Line), msgspec.json.Decoder(Choice)


def is_response(line: bytes) -> bool:
    """Return whether a line of JSONL looks like a response, by its keys."""
    try:
        found = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except NOT_JSON:
        return False
    return bool({"choices", "prompt_logprobs", "response"} & set(found))


def first_top_k(path: Path) -> int:
    """Return the K of the first lines: of each token all entries, but not its own beyond K."""
    widths, failed = list[int](), list[StoreError]()
    for number, line in islice(lines_of(path), SAMPLED_LINES):
        try:
            widths.append(_width(_read(line)[1]))
        except (AnswerError, StoreError) as error:
            failed.append(_named(path, number, error))
    if not any(widths):
        if widths:
            raise StoreError(f"{path}: the first lines have no log-probabilities of prompt tokens")
        raise failed[0] if failed else StoreError(f"{path} has no lines")
    return min(width for width in widths if width)


def read_responses(
    path: Path,
    spec: StoreSpec,
    *,
    renumber: bool = False,
    on_bad_line: Callable[[StoreError], None] | None = None,
    changes: Changes | None = None,
) -> Iterator[Sample]:
    """Yield the samples of a file, cut to the first `spec.top_k` ids; the log-sum-exp is 0.

    `changes` counts ids beyond the vocabulary, and samples by their K. With `renumber` a sample's
    row is its line number, counted from 0. Raises StoreError, naming file and line, for a line that
    is no response, or whose values do not fit its tokens; with `on_bad_line` the line is skipped
    and the error passed to that function.
    """
    last = -1
    changes = Changes(Padding()) if changes is None else changes
    for count, (number, line) in enumerate(lines_of(path)):
        try:
            sample = _sample(line, count, renumber, spec, changes)
            check_ascending(sample.row, last, count)
        except (AnswerError, StoreError) as error:
            bad = _named(path, number, error)
            skip_or_raise(bad, error, on_bad_line)
            continue
        last = sample.row
        yield sample


def _named(path: Path, number: int, error: Exception) -> StoreError:
    """Return an error that names the line; the checks are a dump's, and name its settings."""
    text = str(error).replace(", or teacher.api is not its format", "")
    text = text.replace("teacher.tokenizer", "--tokenizer").replace("dump.top_k=", "K=")
    return StoreError(f"{path}, line {number}: {text}")


def _sample(line: bytes, count: int, renumber: bool, spec: StoreSpec, changes: Changes) -> Sample:
    record, answer = _read(line)
    tokens = _prompt(record)
    if tokens is None:
        tokens = answer.tokens
    if tokens is None:
        raise StoreError(
            "no token ids of the prompt: request them with return_token_ids=true, or add the "
            "request's ids to the line as `prompt`"
        )
    given = _ids(tokens)
    input_ids, mask, answers = checked_tokens(given, _mask(record, given), spec.vocab_size)
    row = count if renumber or record.index is None else record.index
    if not 0 <= row < 1 << 63:
        raise StoreError(f"index must be a row number, not {row}")
    one = Row(row, input_ids, mask)
    topk = _topk(answer, one, spec, changes) if answers else _nothing(spec)
    return Sample(row, input_ids, mask, topk)


def _refuse_generated(response: _Line) -> None:
    """Refuse a chat completion with an answer: it would be left out, and the prompt be learned.

    An answer of one token is what vLLM generates at least.
    """
    number = response.usage.completion_tokens if response.usage else None
    if number is not None and number > 1 and _given(response.choices):
        choices = msgspec.json.decode(response.choices, type=list[dict[str, msgspec.Raw]])
        if any("message" in choice for choice in choices):
            raise StoreError(
                f"the response has an answer of {number} tokens, which have no prompt_logprobs: it "
                "would be left out, and every token of its prompt be learned; request "
                "prompt_logprobs of prompt and answer together, or add prompt_length or loss_mask "
                "to the line to learn tokens of the prompt"
            )


def _topk(answer: Answer, row: Row, spec: StoreSpec, changes: Changes) -> TopK:
    width = _width(answer)
    if width < spec.top_k:
        raise StoreError(
            f"the response has the {width} most probable ids of each token, but top_k is "
            f"{spec.top_k}; lower it to {width} with --top-k"
        )
    found = checked(answer, row, replace(spec, top_k=width), _WIRE)
    topk = found.topk(spec.vocab_size).map(torch.Tensor.numpy)
    beyond = found.all_ids >= spec.vocab_size
    mass = float(found.p[beyond].sum())
    changes.padding.add(Padding(int(beyond.sum()), int(beyond.any(1).sum()), mass))
    changes.widths[width] += 1
    k = spec.top_k
    return replace(topk, ids=topk.ids[:, :k], logits=topk.logits[:, :k])


def _nothing(spec: StoreSpec) -> TopK:
    ids = np.zeros((0, spec.top_k), np.int64)
    return TopK(ids=ids, logits=ids.astype(np.float32), logsumexp=np.zeros((0, 1), np.float32))


def _read(line: bytes) -> tuple[_Line, Answer]:
    """Return a line's own keys and the response that it is or has."""
    if line.count(b"{") > MAX_OBJECTS:
        raise StoreError(f"more than {MAX_OBJECTS} objects; give each response a line of its own")
    record, content = _decoded(line), line
    inner = record
    for _ in range(2):  # response, and body within it
        within = next(filter(_given, (inner.response, inner.body)), None)
        if _given(inner.choices) or _given(inner.prompt_logprobs) or within is None:
            break
        content = bytes(within)
        inner = _decoded(content)
    if record.loss_mask is None and record.prompt_length is None:
        _refuse_generated(inner)
    if _given(inner.prompt_logprobs):
        return record, _top(content)
    if _given(inner.choices):
        return record, _WIRE.parse(content)
    failed = f": the request failed ({record.error!r:.200})" if record.error else ""
    raise StoreError(f"no response with choices or prompt_logprobs{failed}")


def _given(value: msgspec.Raw) -> bool:
    return bytes(value) not in (b"", b"null")


def _top(content: bytes) -> Answer:
    """Return the answer of a chat completion or RequestOutput, which has it at the top."""
    try:
        found = _TOP.decode(content)
    except NOT_JSON as error:
        raise StoreError(f"prompt_logprobs are not in vLLM's format: {error}") from error
    return Answer(found.prompt_logprobs or [], found.prompt_token_ids, None)


def _decoded(content: bytes) -> _Line:
    try:
        return _LINE.decode(content)
    except NOT_JSON as error:
        raise StoreError(f"not a response in JSON: {error}") from error


def _width(answer: Answer) -> int:
    """Return K: the least number of a token's entries whose ranks are 1, 2, ..., K."""
    return min((_ranked(each) for each in answer.positions if each), default=0)


def _ranked(position: Any) -> int:
    ranks = {each.rank for each in position.values()}
    if None in ranks:
        return len(position)
    return next(k for k in range(len(ranks) + 1) if k + 1 not in ranks)


def _prompt(record: _Line) -> Any:
    """Return the token ids of the line's request; None if it has none or the prompt is a text."""
    request = record.request if isinstance(record.request, dict) else {}
    body = request.get("body")
    within = body if isinstance(body, dict) else request
    found = record.prompt if record.prompt is not None else within.get("prompt")
    return found if isinstance(found, list) else None


def _ids(tokens: Any) -> NDArray[np.int64]:
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
        raise StoreError("the prompt's token ids must be a list of integers, of one prompt")
    return np.array(tokens, np.int64)


def _mask(record: _Line, input_ids: NDArray[Any]) -> NDArray[np.int64]:
    """Return the loss mask [S], which is 0 for the first token: nothing predicts it."""
    if record.loss_mask is not None:
        if record.prompt_length is not None:
            raise StoreError("loss_mask and prompt_length are both given; omit one of them")
        if not set(record.loss_mask) <= {0, 1}:
            raise StoreError("loss_mask must contain only 0 and 1")
        mask = np.array(record.loss_mask, np.int64)
        if mask.shape != input_ids.shape:
            raise StoreError(f"loss_mask has {mask.size} values for {input_ids.size} tokens")
    else:
        length = record.prompt_length or 0
        if not 0 <= length <= input_ids.size:
            raise StoreError(f"prompt_length is {length} for {input_ids.size} tokens")
        mask = (np.arange(input_ids.size) >= length).astype(np.int64)
    mask[:1] = 0
    return mask
