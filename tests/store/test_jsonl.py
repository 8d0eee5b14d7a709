"""NeMo-Aligner's JSONL: the same samples both ways, and a clear refusal of every broken line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.store import StoreError, read_jsonl, write_jsonl
from nemo_kd.store.codecs import ABSENT_ID
from tests.store.samples import sample, spec

NAN = float("nan")


def record(row: int = 0, **changes: Any) -> dict[str, Any]:
    """A line by hand: two prompt and two answer tokens, K = 2."""
    rows = [[0.0, 0.0], [3.0, 2.0], [5.0, 4.0]]
    value = {
        "tokens": [7, 8, 9],
        "labels": [8, 9, 2],
        "loss_mask": [0, 1, 1],
        "topk_logits": rows,
        "topk_token_ids": [[0, 0], [9, 4], [4, 2]],
        "log_sum_exp_logits": [0.0, 3.5, 5.5],
        "index": row,
    }
    return {**value, **changes}


def lines(path: Path, *records: Any) -> Path:
    texts = (one if isinstance(one, str) else json.dumps(one) for one in records)
    path.write_text("\n".join(texts) + "\n")
    return path


def test_a_line_is_the_sample_shifted_by_one(tmp_path: Path) -> None:
    (one,) = read_jsonl(lines(tmp_path / "x.jsonl", record(5)), spec(top_k=2))
    assert one.row == 5
    assert one.input_ids.tolist() == [7, 8, 9, 2]
    assert one.loss_mask.tolist() == [0, 0, 1, 1]
    assert one.topk_ids.tolist() == [[9, 4], [4, 2]]
    assert one.topk_logits.tolist() == [[3.0, 2.0], [5.0, 4.0]]
    assert one.logsumexp.tolist() == [[3.5], [5.5]]


def test_padding_after_the_answer_is_cut(tmp_path: Path) -> None:
    padded = record(
        tokens=[7, 8, 9, 2, 0],
        labels=[8, 9, 2, 0, 0],
        loss_mask=[0, 1, 1, 0, 0],
        topk_logits=[*record()["topk_logits"], [0, 0], [0, 0]],
        topk_token_ids=[*record()["topk_token_ids"], [0, 0], [0, 0]],
        log_sum_exp_logits=[0.0, 3.5, 5.5, 0.0, 0.0],
    )
    (plain,) = read_jsonl(lines(tmp_path / "a.jsonl", record()), spec(top_k=2))
    (cut,) = read_jsonl(lines(tmp_path / "b.jsonl", padded), spec(top_k=2))
    assert cut.input_ids.tolist() == plain.input_ids.tolist()
    assert cut.topk_ids.tolist() == plain.topk_ids.tolist()


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_written_and_read_it_is_the_same_sample(tmp_path: Path, chunk: int | None) -> None:
    of = spec(top_k=7)
    samples = [sample(row, of, answers) for row, answers in enumerate((3, 0, 1, 5, 2))]
    path = tmp_path / ("x.jsonl" if chunk is None else "x-CHUNK_ID.jsonl")
    assert write_jsonl(path, samples, samples_per_chunk=chunk) == 5
    assert len(list(tmp_path.iterdir())) == {None: 1, 1: 5, 3: 2, 100: 1}[chunk]
    for was, now in zip(samples, read_jsonl(path, of), strict=True):
        assert was.row == now.row
        assert np.array_equal(was.input_ids, now.input_ids)
        assert np.array_equal(was.loss_mask[1:], now.loss_mask[1:])
        assert np.array_equal(was.topk_ids, now.topk_ids)
        assert np.allclose(was.topk_logits, now.topk_logits, atol=1e-5)
        assert np.allclose(was.logsumexp, now.logsumexp, atol=1e-5)


def test_absent_places_survive(tmp_path: Path) -> None:
    one = sample(0, spec(top_k=4), 2)
    one.topk_ids[:, 3], one.topk_logits[:, 3] = ABSENT_ID, -np.inf
    write_jsonl(tmp_path / "x.jsonl", [one])
    assert "Infinity" not in (tmp_path / "x.jsonl").read_text()
    (read,) = read_jsonl(tmp_path / "x.jsonl", spec(top_k=4))
    assert np.array_equal(read.topk_ids, one.topk_ids)
    assert np.isneginf(read.topk_logits[:, 3]).all()


BROKEN: dict[str, tuple[Any, str]] = {
    "cut off": (json.dumps(record())[:70], "not JSON"),
    "a list": ([1, 2], "a JSON object is expected, not a list"),
    "missing key": ({k: v for k, v in record().items() if k != "labels"}, "no labels among"),
    "ids as strings": (record(topk_token_ids=[["0", "0"], ["9", "4"], ["4", "2"]]), "whole ones"),
    "ids with a point": (record(topk_token_ids=[[0, 0], [9.5, 4], [4, 2]]), "whole ones"),
    "ragged": (record(topk_logits=[[0, 0], [3], [5, 4]]), "unequal length"),
    "one row fewer": (record(topk_logits=[[3, 2], [5, 4]]), "2 rows for 3 tokens"),
    "NaN": (record(topk_logits=[[0, 0], [3, NAN], [5, 4]]), "not a number"),
    "infinite log-sum-exp": (record(log_sum_exp_logits=[0, 3.5, float("inf")]), "log-sum-exp"),
    "unsorted": (record(topk_logits=[[0, 0], [2, 3], [5, 4]]), "logits must fall"),
    "above the sum": (record(log_sum_exp_logits=[0, 2.5, 5.5]), "above the log-sum-exp"),
    "one id twice": (record(topk_token_ids=[[0, 0], [9, 9], [4, 2]]), "the same id twice"),
    "id out of range": (record(topk_token_ids=[[0, 0], [500, 4], [4, 2]]), "an id out of place"),
    "token out of range": (record(tokens=[7, 8, -9], labels=[8, -9, 2]), "outside \\[0"),
    "not shifted": (record(labels=[8, 8, 2]), "not the tokens shifted"),
    "mask of halves": (record(loss_mask=[0, 0.5, 1]), "only 0 and 1"),
    "unequal": (record(labels=[8, 9]), "the same number"),
    "no tokens": (record(tokens=[], labels=[], loss_mask=[]), "at least 1|must be"),
    "fewer logits than K": (
        record(topk_logits=[[0], [3], [5]], topk_token_ids=[[0], [9], [4]]),
        "1 values a token, top_k is 2; lower it to 1",
    ),
    "no row number": (record("three"), "index must be a row number"),
    "falling row numbers": (record(0), "rows must rise"),
    "huge number": (record(topk_token_ids=[[0, 0], [10**30, 4], [4, 2]]), "whole ones|out of"),
    "deep": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_is_named_and_nothing_else_is_lost(tmp_path: Path, kind: str) -> None:
    broken, message = BROKEN[kind]
    if isinstance(broken, dict) and broken.get("index") == 0 and "falling" not in kind:
        broken = {**broken, "index": 2}
    path = lines(tmp_path / "x.jsonl", record(1), broken, "", record(3))
    of = spec(top_k=2)
    with pytest.raises(StoreError, match=f"x.jsonl, line 2: .*({message})"):
        list(read_jsonl(path, of))
    skipped: list[StoreError] = []
    assert [one.row for one in read_jsonl(path, of, on_bad_line=skipped.append)] == [1, 3]
    assert len(skipped) == 1


def test_rows_can_be_numbered_anew_over_chunks(tmp_path: Path) -> None:
    lines(tmp_path / "x-0.jsonl", record(9), record(9))
    lines(tmp_path / "x-1.jsonl", record(0))
    lines(tmp_path / "x-3.jsonl", record(0))  # not reached: chunk 2 is missing
    read = read_jsonl(tmp_path / "x-CHUNK_ID.jsonl", spec(top_k=2), renumber=True)
    assert [one.row for one in read] == [0, 1, 2]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "nothing.jsonl", spec()))
    with pytest.raises(StoreError, match=r"no file .*x-0.jsonl"):
        list(read_jsonl(tmp_path / "x-CHUNK_ID.jsonl", spec()))
    with pytest.raises(StoreError, match=r"temperature 1.0 alone"):
        list(read_jsonl(tmp_path / "nothing.jsonl", spec(temperatures=(1.0, 2.0))))


def test_a_failing_writer_leaves_no_file(tmp_path: Path) -> None:
    def samples() -> Any:
        yield sample(0, spec(), 2)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "x.jsonl", samples())
    assert not list(tmp_path.iterdir())
