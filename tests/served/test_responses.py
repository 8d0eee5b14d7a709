"""vLLM's responses saved as JSONL: values by hand, a server's answers, damaged lines."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.served.responses import first_top_k, is_response, read_responses
from nemo_kd.store import Sample, Store, StoreError
from nemo_kd.store.tools.logprobs import Changes
from nemo_kd.store.tools.padding import Padding
from nemo_kd.topk import ABSENT_ID
from tests.served.server import Server
from tests.store.samples import spec

OF = spec(top_k=2, vocab_size=6)


def entry(*values: tuple[int, float, int]) -> dict[str, Any]:
    """One position: id, probability and rank of each entry."""
    return {
        str(token): {"logprob": float(np.log(p)), "rank": rank, "decoded_token": "x"}
        for token, p, rank in values
    }


# Four tokens 3, 1, 4, 5: the label 4 is the second most probable, 5 the fourth.
POSITIONS = [
    None,
    entry((1, 0.5, 1), (0, 0.25, 2)),
    entry((4, 0.25, 2), (2, 0.5, 1)),
    entry((5, 0.125, 4), (3, 0.375, 1), (0, 0.25, 2)),
]
IDS = [3, 1, 4, 5]


def choice(**changes: Any) -> dict[str, Any]:
    return {"index": 0, "text": "", "prompt_logprobs": POSITIONS, "prompt_token_ids": IDS} | changes


def line(**changes: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 4, "completion_tokens": 1}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice()], "usage": usage} | (
        changes
    )


def chat(**changes: Any) -> dict[str, Any]:
    """A chat completion, with what vLLM has of the prompt at its top."""
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "The answer."}}],
        "prompt_logprobs": POSITIONS,
        "prompt_token_ids": IDS,
        "usage": {"prompt_tokens": 4, "completion_tokens": 7},
    } | changes


def read(path: Path, *records: Any, **options: Any) -> list[Sample]:
    texts = (one if isinstance(one, str) else json.dumps(one) for one in records)
    path.write_text("\n".join(texts) + "\n")
    return list(read_responses(path, options.pop("of", OF), **options))


def without_ids(**changes: Any) -> dict[str, Any]:
    return line(choices=[choice(prompt_token_ids=None)], **changes)


def test_a_response_by_hand(tmp_path: Path) -> None:
    (one,) = read(tmp_path / "x.jsonl", line())
    assert one.row == 0
    assert one.input_ids.tolist() == IDS
    assert one.loss_mask.tolist() == [0, 1, 1, 1]
    assert one.topk.ids.tolist() == [[1, 0], [2, 4], [3, 0]]  # 5 is of rank 4: no third entry
    p = np.exp(one.topk.logits)
    assert p == pytest.approx(np.array([[0.5, 0.25], [0.5, 0.25], [0.375, 0.25]]))
    assert one.topk.logsumexp.tolist() == [[0.0]] * 3
    assert first_top_k(tmp_path / "x.jsonl") == 2


SHAPES: dict[str, dict[str, Any]] = {
    "the request beside it": {"request": {"prompt": IDS, "prompt_logprobs": 2}} | without_ids(),
    "its ids beside it": without_ids(prompt=IDS),
    "request and response": {"request": {"prompt": IDS}, "response": without_ids()},
    "a batch's": {
        "custom_id": "7",
        "response": {"status_code": 200, "body": line()},
        "error": None,
    },
    "a batch's with its request": {
        "request": {"custom_id": "7", "body": {"prompt": IDS}},
        "response": {"status_code": 200, "body": without_ids()},
    },
    "a chat completion": {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hm"}}],
        "prompt_logprobs": POSITIONS,
        "prompt_token_ids": IDS,
    },
    "an offline output": {
        "request_id": "0",
        "prompt": None,
        "prompt_token_ids": IDS,
        "prompt_logprobs": POSITIONS,
    },
    "without ranks": line(
        choices=[
            choice(
                prompt_logprobs=[
                    each and {t: {"logprob": v["logprob"]} for t, v in each.items()}
                    for each in POSITIONS
                ]
            )
        ]
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_line_is_the_same_sample(tmp_path: Path, shape: str) -> None:
    (plain,) = read(tmp_path / "x.jsonl", line())
    (one,) = read(tmp_path / "y.jsonl", SHAPES[shape])
    assert is_response((tmp_path / "y.jsonl").read_bytes())
    assert first_top_k(tmp_path / "y.jsonl") == 2
    assert one.input_ids.tolist() == IDS
    assert np.array_equal(one.topk.ids, plain.topk.ids)
    assert np.array_equal(one.topk.logits, plain.topk.logits)


def test_answer_tokens_are_a_masks_or_all_after_the_prompt(tmp_path: Path) -> None:
    masked, after, none = read(
        tmp_path / "x.jsonl",
        line(loss_mask=[1, 0, 1, 0], index=2),
        line(prompt_length=3, index=5),
        line(prompt_length=4, index=6),
    )
    assert (masked.row, after.row, none.row) == (2, 5, 6)
    assert masked.loss_mask.tolist() == [0, 0, 1, 0]  # nothing predicts the first token
    assert masked.topk.ids.tolist() == [[2, 4]]
    assert after.loss_mask.tolist() == [0, 0, 0, 1]
    assert after.topk.ids.tolist() == [[3, 0]]
    assert none.topk.ids.shape == (0, 2)


def test_a_chats_prompt_is_learned_if_asked_for(tmp_path: Path) -> None:
    """Or if the server was only asked for the prompt: it generates a token at least."""
    one = {"prompt_tokens": 4, "completion_tokens": 1}
    for given in (chat(prompt_length=2), chat(loss_mask=[0, 0, 1, 1]), chat(usage=one)):
        (found,) = read(tmp_path / "x.jsonl", given)
        assert found.loss_mask.tolist()[2:] == [1, 1]


def test_fewer_ids_are_kept_and_those_beyond_the_vocabulary_are_absent(tmp_path: Path) -> None:
    (one,) = read(tmp_path / "x.jsonl", line(), of=replace(OF, top_k=1))
    assert one.topk.ids.tolist() == [[1], [2], [3]]
    positions = [*POSITIONS[:3], entry((5, 0.9995, 1), (9, 1e-4, 2))]
    (one,) = read(tmp_path / "x.jsonl", line(choices=[choice(prompt_logprobs=positions)]))
    assert one.topk.ids.tolist()[-1] == [5, ABSENT_ID]
    assert np.isneginf(one.topk.logits[-1, 1])


def test_ids_beyond_the_vocabulary_and_the_ks_of_lines_are_counted(tmp_path: Path) -> None:
    padded = [*POSITIONS[:3], entry((5, 0.9995, 1), (9, 1e-4, 2))]
    wider = [entry((label, 0.5, 1), (0, 0.25, 2), (2, 0.125, 3)) for label in IDS[1:]]
    changes = Changes(Padding())
    lines = (line(choices=[choice(prompt_logprobs=each)]) for each in (padded, [None, *wider]))
    read(tmp_path / "x.jsonl", *lines, of=OF, changes=changes, renumber=True)
    assert (changes.padding.ids, changes.padding.tokens) == (1, 1)
    assert changes.padding.mass == pytest.approx(1e-4)
    assert changes.widths == {2: 1, 3: 1}


MANY = [(1, 0.4, 1), (0, 0.3, 2), (2, 0.2, 3), (3, 0.1, 4)]
BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not a response in JSON"),
    "deep": ("[" * 10**5, "not a response in JSON"),
    "another object": ({"tokens": [1]}, "no response with choices or prompt_logprobs"),
    "a failed request": (
        {"custom_id": "1", "response": None, "error": {"message": "too long"}},
        "the request failed .*too long",
    ),
    "no prompt_logprobs": (line(choices=[choice(prompt_logprobs=None)]), "no prompt_logprobs"),
    "two choices": (line(choices=[choice(), choice()]), "2 choices: request n=1"),
    "an answer to a chat": (chat(), "an answer of 7 tokens, which have no prompt_logprobs"),
    "in a batch": ({"response": {"body": chat()}}, "an answer of 7 tokens"),
    "no token ids": (without_ids(), "return_token_ids=true"),
    "a text as prompt": (without_ids(prompt="abc"), "return_token_ids=true"),
    "two prompts": (without_ids(prompt=[[1], [2]]), "of one prompt"),
    "ids of another prompt": (line(prompt=[3, 1, 4, 4]), "token 3 is 4, but .* 5 there"),
    "shifted": (
        line(choices=[choice(prompt_logprobs=[*POSITIONS[1:], POSITIONS[1]])]),
        "log-probabilities for the first token",
    ),
    "short": (line(choices=[choice(prompt_logprobs=POSITIONS[:3])]), "has 3 positions"),
    "a hole": (
        line(choices=[choice(prompt_logprobs=[None, None, *POSITIONS[2:]])]),
        "no log-probabilities at 1 positions",
    ),
    "of K = 1": (
        line(
            choices=[
                choice(
                    prompt_logprobs=[
                        None,
                        *(entry((token, 0.9, 1)) for token in IDS[1:]),
                    ]
                )
            ]
        ),
        "lower it to 1 with --top-k",
    ),
    "no distribution": (
        line(
            choices=[
                choice(prompt_logprobs=[*POSITIONS[:3], entry((5, 1.5, 1), (0, 0.5, 2))]),
            ]
        ),
        "not the log-probabilities of a softmax",
    ),
    "more ids at one token": (
        line(choices=[choice(prompt_logprobs=[None, entry(*MANY), *POSITIONS[2:]])]),
        "has 4 ids at position 1, expected K=2",
    ),
    "an index that falls": (line(index=0), "rows must ascend"),
    "a time stamp": (line(index=1700000000), "far larger than the number of lines"),
    "a negative index": (line(index=-1), "index must be a row number"),
    "mask and length": (line(loss_mask=[0] * 4, prompt_length=2), "omit one of them"),
    "a short mask": (line(loss_mask=[0, 1]), "loss_mask has 2 values for 4 tokens"),
    "a mask of twos": (line(loss_mask=[0, 2, 1, 1]), "only 0 and 1"),
    "a long prompt": (line(prompt_length=5), "prompt_length is 5 for 4 tokens"),
    "a token out of range": (
        line(choices=[choice(prompt_token_ids=[6, 1, 4, 5])]),
        "outside \\[0",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    bad, message = BAD[kind]
    lines = [line(index=1), "", bad, line(index=3)]
    with pytest.raises(StoreError, match=f"x.jsonl, line 3: .*({message})"):
        read(tmp_path / "x.jsonl", *lines)
    skipped: list[StoreError] = []
    read_on = read(tmp_path / "x.jsonl", *lines, on_bad_line=skipped.append)
    assert [one.row for one in read_on] == [1, 3] and len(skipped) == 1


def test_saved_answers_of_a_server_are_the_dump_of_its_teacher(
    server: Server, teacher: Path, tmp_path: Path
) -> None:
    store = Store(teacher / "store")
    lines = []
    for sample in store:
        request = {"model": "teacher", "prompt": sample.input_ids.tolist(), "prompt_logprobs": 20}
        data = json.dumps({**request, "max_tokens": 1}).encode()
        headers = {"Content-Type": "application/json"}
        post = urllib.request.Request(f"{server.url}/v1/completions", data, headers)
        with urllib.request.urlopen(post, timeout=60) as reply:
            response = json.load(reply)
        mask = sample.loss_mask.tolist()
        lines.append({"request": request, "response": response, "loss_mask": mask})
    for was, now in zip(store, read(tmp_path / "x.jsonl", *lines, of=store.spec), strict=True):
        assert np.array_equal(was.input_ids, now.input_ids)
        assert np.array_equal(was.loss_mask, now.loss_mask)
        logprobs = was.topk.logits - was.topk.logsumexp
        assert np.allclose(logprobs, now.topk.logits, atol=0.01)  # the store has float16
        assert (was.topk.ids == now.topk.ids).mean() > 0.99  # ties of float16
