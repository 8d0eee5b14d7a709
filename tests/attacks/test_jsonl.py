"""Hostile JSONL: each line is one error that names it, in bounded time and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.cli.caches import Aligner
from nemo_kd.errors import NemoKDError
from nemo_kd.sft.jsonl import JsonlFile
from nemo_kd.sft.previews import first_row
from nemo_kd.store import StoreError, read_jsonl, write_jsonl
from nemo_kd.store.tools import lines
from tests.attacks.bounds import bounded
from tests.store.samples import sample, spec


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    write_jsonl(path, [sample(0, spec(), answers=3)])
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def rows(length: int, width: int, value: Any) -> list[list[Any]]:
    return [[value] * width] * length


LONG = "x" * 1_000_000
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "texts": ({"tokens": ["a", "b"]}, "tokens must be a list of numbers"),
    "one long text among many": ({"tokens": [LONG, *["a"] * 100_000]}, "tokens must be a list"),
    "objects": ({"labels": [{}] * 5}, "labels must be a list"),
    "nothing": ({"labels": None}, "labels must be a list"),
    "lists in a list": ({"tokens": [[1]] * 5}, "tokens must be a list"),
    "numbers of 400 digits": ({"tokens": [10**400] * 5}, "tokens must be a list"),
    "rows of texts": ({"topk_logits": rows(5, 5, LONG)}, "topk_logits must be a list of lists"),
    "ragged rows": ({"topk_logits": [[1.0], [1.0, 2.0]]}, "different lengths"),
    "no rows": ({"topk_token_ids": []}, "must be a list of lists"),
    "an infinite logit": ({"topk_logits": rows(5, 5, float("inf"))}, "not a number"),
    "NaN": ({"log_sum_exp_logits": [float("nan")] * 5}, "not finite"),
    "a vocabulary of its own": ({"tokens": [1 << 62] * 5}, "outside [0, vocab_size=500)"),
    "a negative id": ({"tokens": [-1] * 5}, "outside [0, vocab_size=500)"),
    "a text as index": ({"index": "7"}, "index must be a row number"),
    "a negative index": ({"index": -1}, "index must be a row number"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_hostile_record_is_one_error(record: dict[str, Any], tmp_path: Path, kind: str) -> None:
    change, message = CHANGES[kind]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record | change) + "\n")
    with bounded(), pytest.raises(StoreError) as caught:
        list(read_jsonl(path, spec()))
    assert message in str(caught.value) and "line 1" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


LINES = {
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 1_000_000,
    "millions of lists": b'{"tokens": [' + b"[]," * (1 << 22) + b"[]]}",
    "a number of a million digits": b'{"tokens": [' + b"9" * 1_000_000 + b"]}",
    "no UTF-8": b'{"tokens": "\xff"}',
    "zero bytes": b"\0" * 1000,
    "a number": b"7",
    "no end": b'{"tokens": [1, 2',
}


@pytest.mark.parametrize("kind", LINES)
def test_a_hostile_line_is_one_error_wherever_lines_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES[kind] + b"\n")
    with bounded():
        with pytest.raises(StoreError, match="line 1"):
            list(read_jsonl(path, spec()))
        with pytest.raises(StoreError, match="no line has topk_token_ids"):
            Aligner(str(path), renumber=False).top_k()
        if kind not in ("millions of lists", "a number"):  # JSON, which a template refuses
            with pytest.raises(NemoKDError, match="row 0"):
                JsonlFile(path)[0]
            assert first_row(path) is None


def test_a_line_without_an_end_is_not_read_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    (tmp_path / "x.jsonl").write_bytes(b" " * 1001)
    with pytest.raises(StoreError, match="line 1: more than 1000 bytes"):
        list(read_jsonl(tmp_path / "x.jsonl", spec()))
