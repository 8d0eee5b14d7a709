"""Answers about one row: what belongs to its top-K, and values that no softmax has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from nemo_kd.served.answer import AnswerError, topk_of
from nemo_kd.served.sglang import SGLang
from nemo_kd.served.vllm import VLLM
from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.topk import TopK

V, K = 40, 4
TOKENS = [3, 9, 30]
P = [0.4, 0.3, 0.2, 0.05]
"""Probabilities of the top-K; the other 36 ids share 0.05."""
TOP = {7: P[0], 9: P[1], 1: P[2], 5: P[3]}


Entries = Mapping[int, float | None]


def answer(first: Entries, second: Entries) -> TopK:
    """Parse an answer by vLLM with the given log-probabilities at the two answer tokens."""
    given = [{str(i): {"logprob": x} for i, x in each.items()} for each in (first, second)]
    return parse(VLLM(), {"choices": [{"prompt_logprobs": [None, *given]}]})


def parse(wire: Any, value: Any, tokens: list[int] = TOKENS) -> TopK:
    row = Row(0, np.array(tokens, np.int32), np.array([0, 1, 1], np.uint8))
    spec = StoreSpec(top_k=K, vocab_size=V)
    return topk_of(wire.parse(json.dumps(value).encode()), row, spec, wire)


def logs(top: Mapping[int, float]) -> dict[int, float | None]:
    return {i: math.log(p) for i, p in top.items()}


def test_the_tokens_own_entry_is_not_the_k_plus_first() -> None:
    topk = answer(logs(TOP), {30: math.log(0.001), **logs(TOP)})
    assert topk.ids.tolist() == [[7, 9, 1, 5], [7, 9, 1, 5]]
    assert torch.allclose(topk.logits.exp(), torch.tensor([P, P]))
    assert topk.logsumexp is not None and topk.logsumexp.tolist() == [[0.0], [0.0]]


def test_a_token_that_ties_with_the_last_of_the_top_k_is_dropped_all_the_same() -> None:
    """vLLM counts its rank among K where its probability equals that of the K-th."""
    topk = answer(logs(TOP), {30: math.log(P[-1]), **logs(TOP)})
    assert 30 not in topk.ids[1]


def test_entries_in_any_order_are_sorted() -> None:
    backwards = dict(reversed(logs(TOP).items()))
    assert answer(backwards, {**backwards, 30: -9.0}).ids.tolist() == [[7, 9, 1, 5]] * 2


def test_ids_of_probability_zero_and_padding_of_the_lm_head_are_absent() -> None:
    top = {9: math.log(0.7), 7: math.log(0.3), 45: -14.0, 2: -9999.0}
    topk = answer(top, {30: None, **top})
    assert topk.ids.tolist() == [[9, 7, -1, -1]] * 2
    assert topk.logits[:, 2:].isneginf().all()


def test_log_probabilities_rounded_to_bfloat16_are_accepted() -> None:
    def rounded(x: float) -> float:
        return float(torch.tensor(x).bfloat16())

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = torch.randn(V, generator=generator).mul(3).softmax(-1)
        top = {int(i): rounded(math.log(p[i])) for i in p.topk(K).indices}
        own = [{token: rounded(math.log(p[token])), **top} for token in TOKENS[1:]]
        answer(own[0], own[1])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({**logs(TOP), 30: math.log(0.06)}, "token 30 at position 2 has log-probability -2.813"),
        (logs(TOP), "no entry for token 30 at position 2: it is shifted, or belongs to another"),
        ({**logs(TOP), 30: -9.0, 31: -10.0}, "has 6 ids at position 2, expected dump.top_k=4"),
        ({7: -0.5, 30: -1.0}, r"has 2 ids at .*raise the server's limit \(--max-logprobs\)"),
        ({7: -0.1, 30: -0.2, 1: -0.3, 5: -0.4}, "not the log-probabilities of a softmax"),
        ({7: 3.0, 30: -7.0, 1: -7.0, 5: -7.0}, "not the log-probabilities of a softmax"),
        ({7: -9.0, 30: -9.5, 1: -9.5, 5: -9.9}, "not the log-probabilities of a softmax"),
        ({7: None, 30: None, 1: None, 5: None}, "not the log-probabilities of a softmax"),
        ({45: -0.1, 30: -2.4, 1: -7.0, 5: -7.0}, "beyond the tokenizer's 40 tokens"),
    ],
)
def test_what_contradicts_itself_is_an_error(second: dict[int, float], message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        answer(logs(TOP), second)


def sglang(own: list[Any], top: dict[int, float]) -> dict[str, Any]:
    items = [[x, i, None] for i, x in logs(top).items()]
    lists = {"input_token_logprobs": own, "input_top_logprobs": [None, items, items]}
    return {"text": "", "meta_info": lists}


def test_sglang_writes_0_for_the_last_id_of_the_vocabulary() -> None:
    own = [[None, 3, None], [math.log(P[1]), 9, None], [-6.0, 0, None]]
    topk = parse(SGLang(), sglang(own, TOP), [3, 9, V - 1])
    assert topk.ids.tolist() == [[7, 9, 1, 5]] * 2
    with pytest.raises(AnswerError, match="token 2 is 30, but the answer is about 0 there"):
        parse(SGLang(), sglang(own, TOP))


def test_sglangs_two_lists_must_agree() -> None:
    own = [[None, 3, None], [-5.0, 9, None], [-6.0, 30, None]]
    with pytest.raises(AnswerError, match="token 9 at position 1 has log-probability -5, which"):
        parse(SGLang(), sglang(own, TOP))
    with pytest.raises(AnswerError, match="2 input_token_logprobs and 3 input_top_logprobs"):
        parse(SGLang(), sglang(own[:2], TOP))


@pytest.mark.parametrize(
    "value", [[], {}, {"choices": []}, {"choices": [{"text": "x"}]}, "x", None]
)
def test_another_format_is_an_error(value: Any) -> None:
    for wire in (VLLM(), SGLang()):
        with pytest.raises(AnswerError, match="the answer"):
            parse(wire, value)
