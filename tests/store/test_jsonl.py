"""NeMo-Aligner's JSONL: the same samples both ways, and a clear refusal of every broken line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.store import StoreError, read_jsonl, write_jsonl
from nemo_kd.store.tools.chunks import chunk_paths
from nemo_kd.store.tools.padding import MAX_PADDING, Padding
from nemo_kd.topk import ABSENT_ID
from tests.conftest import ROOT
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
    assert one.topk.ids.tolist() == [[9, 4], [4, 2]]
    assert one.topk.logits.tolist() == [[3.0, 2.0], [5.0, 4.0]]
    assert one.topk.logsumexp.tolist() == [[3.5], [5.5]]


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
    assert cut.topk.ids.tolist() == plain.topk.ids.tolist()


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
        assert np.array_equal(was.topk.ids, now.topk.ids)
        assert np.allclose(was.topk.logits, now.topk.logits, atol=1e-5)
        assert np.allclose(was.topk.logsumexp, now.topk.logsumexp, atol=1e-5)


def test_absent_places_survive(tmp_path: Path) -> None:
    one = sample(0, spec(top_k=4), 2)
    one.topk.ids[:, 3], one.topk.logits[:, 3] = ABSENT_ID, -np.inf
    write_jsonl(tmp_path / "x.jsonl", [one])
    assert "Infinity" not in (tmp_path / "x.jsonl").read_text()
    (read,) = read_jsonl(tmp_path / "x.jsonl", spec(top_k=4))
    assert np.array_equal(read.topk.ids, one.topk.ids)
    assert np.isneginf(read.topk.logits[:, 3]).all()


BROKEN: dict[str, tuple[Any, str]] = {
    "cut off": (json.dumps(record())[:70], "not JSON"),
    "a list": ([1, 2], "expected a JSON object, not a list"),
    "missing key": ({k: v for k, v in record().items() if k != "labels"}, "no labels among"),
    "ids as strings": (
        record(topk_token_ids=[["0", "0"], ["9", "4"], ["4", "2"]]),
        r"numbers \(integers\)",
    ),
    "ids with a point": (
        record(topk_token_ids=[[0, 0], [9.5, 4], [4, 2]]),
        r"numbers \(integers\)",
    ),
    "ragged": (record(topk_logits=[[0, 0], [3], [5, 4]]), "different lengths"),
    "one row fewer": (record(topk_logits=[[3, 2], [5, 4]]), "2 rows for 3 tokens"),
    "NaN": (record(topk_logits=[[0, 0], [3, NAN], [5, 4]]), "not a number"),
    "infinite log-sum-exp": (record(log_sum_exp_logits=[0, 3.5, float("inf")]), "log-sum-exp"),
    "unsorted": (record(topk_logits=[[0, 0], [2, 3], [5, 4]]), "descending order"),
    "above the sum": (record(log_sum_exp_logits=[0, 2.5, 5.5]), "above the log-sum-exp"),
    "one id twice": (record(topk_token_ids=[[0, 0], [9, 9], [4, 2]]), "the same id twice"),
    "id out of range": (
        record(topk_token_ids=[[0, 0], [500 + MAX_PADDING, 4], [4, 2]]),
        "an id that is neither in",
    ),
    "id below 0": (record(topk_token_ids=[[0, 0], [-7, 4], [4, 2]]), "an id that is neither in"),
    "padding as a token": (record(tokens=[7, 500, 9], labels=[500, 9, 2]), "outside \\[0"),
    "padding as the last label": (record(labels=[8, 9, 500]), "outside \\[0"),
    "nothing but padding": (record(topk_token_ids=[[0, 0], [9, 4], [501, 500]]), "no logit at all"),
    "fewer ids than logits": (
        record(topk_logits=[[0, 0, 0], [3, 2, 1], [5, 4, 3]]),
        "topk_token_ids has 2 values per token, but topk_logits 3",
    ),
    "token out of range": (record(tokens=[7, 8, -9], labels=[8, -9, 2]), "outside \\[0"),
    "not shifted": (record(labels=[8, 8, 2]), "not the tokens shifted"),
    "mask of halves": (record(loss_mask=[0, 0.5, 1]), "only 0 and 1"),
    "unequal": (record(labels=[8, 9]), "the same number"),
    "no tokens": (record(tokens=[], labels=[], loss_mask=[]), "at least 1|must be"),
    "fewer logits than K": (
        record(topk_logits=[[0], [3], [5]], topk_token_ids=[[0], [9], [4]]),
        "1 values per token, but top_k is 2; lower it to 1",
    ),
    "no row number": (record(index="three"), "index must be a row number"),
    "falling row numbers": (record(0), "rows must ascend"),
    "a time stamp as row number": (
        record(1_700_000_000),
        "index 1700000000 is far larger than the number of lines so far, 2.*renumber=true",
    ),
    "a row number of 10^30": (record(10**30), "is far larger"),
    "huge number": (record(topk_token_ids=[[0, 0], [10**30, 4], [4, 2]]), "integers|out of"),
    "deep": ("[" * 100_000, "not JSON"),
    "a key twice": (
        json.dumps(record(2))[:-1] + ', "labels": [8, 9, 2]}',
        "'labels' appears twice",
    ),
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


def test_ids_of_the_padding_are_dropped_and_counted(tmp_path: Path) -> None:
    """V = 500, padded to 512: those that follow move up, before the row is cut to K."""
    logits = [[0.0] * 4, [3.0, 2.0, 1.0, 0.0], [5.0, 4.0, 3.0, 2.0]]
    ids = [[501] * 4, [9, 503, 4, 511], [500, 4, 2, 7]]
    path = lines(tmp_path / "x.jsonl", record(topk_logits=logits, topk_token_ids=ids))
    padding = Padding()
    (one,) = read_jsonl(path, spec(top_k=4), padding=padding)
    assert one.topk.ids.tolist() == [[9, 4, ABSENT_ID, ABSENT_ID], [4, 2, 7, ABSENT_ID]]
    assert one.topk.logits.tolist() == [[3, 1, -np.inf, -np.inf], [4, 3, 2, -np.inf]]
    assert one.topk.logsumexp.tolist() == [[3.5], [5.5]]  # of all ids, as the file has it
    assert (padding.ids, padding.tokens) == (3, 2)  # none of a prompt's, where no one looks
    assert padding.mass == pytest.approx(np.exp([-1.5, -3.5, -0.5]).sum())
    (cut,) = read_jsonl(path, spec(top_k=2), padding=Padding())
    assert cut.topk.ids.tolist() == [[9, 4], [4, 2]]
    with pytest.warns(UserWarning, match="x.jsonl: dropped 3 padding ids of the vocabulary"):
        list(read_jsonl(path, spec(top_k=4)))


def test_the_ids_of_a_line_are_counted_before_they_are_cut(tmp_path: Path) -> None:
    """Absent ones are not ids, and a line without answer tokens has none."""
    of, widths = spec(top_k=5), Counter[int]()
    made = [sample(row, of, answers=2 * (row < 2)) for row in range(3)]
    made[1].topk.ids[:, 3:], made[1].topk.logits[:, 3:] = -1, -np.inf
    write_jsonl(tmp_path / "x.jsonl", made)
    read = list(read_jsonl(tmp_path / "x.jsonl", replace(of, top_k=2), widths=widths))
    assert len(read) == 3 and widths == {5: 1, 3: 1, 0: 1}


def test_rows_can_be_numbered_anew_over_chunks(tmp_path: Path) -> None:
    lines(tmp_path / "x-0.jsonl", record(9), record(9))
    lines(tmp_path / "x-1.jsonl", record(0))
    lines(tmp_path / "x-one.jsonl", "of another kind")
    read = read_jsonl(tmp_path / "x-CHUNK_ID.jsonl", spec(top_k=2), renumber=True)
    assert [one.row for one in read] == [0, 1, 2]


CHUNKS: dict[str, tuple[list[str], str]] = {
    "one missing": (["0", "2", "3"], r"x-1.jsonl is missing before .*x-2.jsonl, .*x-3"),
    "from 1": (["1", "2"], r"x-0.jsonl is missing before .*x-1.jsonl, .*x-2"),
    "more than ten": ([*map(str, range(9)), "10"], r"x-9.jsonl is missing before .*x-10.jsonl:"),
    "many beyond": (["0", *map(str, range(2, 12))], r"x-6.jsonl and 5 more: chunks"),
    "leading zeros": (
        ["00", "01"],
        r"x-0\d.jsonl: .* without leading zeros; rename it to .*x-\d.j",
    ),
    "zeros beside": (["0", "1", "01"], r"x-01.jsonl: .* without leading zeros"),
    "a directory": (["0", "1/", "2"], r"x-1.jsonl is named like a chunk but is not a file"),
    "a link to nothing": (["0", "1>"], r"x-1.jsonl is named like a chunk but is not a file"),
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_a_gap_between_chunks_is_an_error(tmp_path: Path, kind: str) -> None:
    numbers, message = CHUNKS[kind]
    for row, number in enumerate(numbers):
        path = tmp_path / f"x-{number[:2].rstrip('/>')}.jsonl"
        if number.endswith("/"):
            path.mkdir()
        elif number.endswith(">"):
            path.symlink_to(tmp_path / "gone")
        else:
            lines(path, record(row))
    with pytest.raises(StoreError, match=message):
        list(read_jsonl(tmp_path / "x-CHUNK_ID.jsonl", spec(top_k=2)))


def test_chunks_may_be_named_by_their_directory(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"part[{number}]").mkdir()
        lines(tmp_path / f"part[{number}]" / f"x-{number}.jsonl", record(number))
    (tmp_path / "part[12]").mkdir()
    lines(tmp_path / "part[12]" / "x-3.jsonl", record(12))  # not that part's name
    read = read_jsonl(tmp_path / "part[CHUNK_ID]" / "x-CHUNK_ID.jsonl", spec(top_k=2))
    assert [one.row for one in read] == list(range(12))


def test_a_shorter_set_of_chunks_leaves_none_of_a_longer_one(tmp_path: Path) -> None:
    of, path = spec(top_k=3), tmp_path / "x-CHUNK_ID.jsonl"
    samples = [sample(row, of, 2) for row in range(6)]
    write_jsonl(path, samples, samples_per_chunk=1)
    (tmp_path / "x-old.jsonl").write_text("mine")
    write_jsonl(path, samples[:3], samples_per_chunk=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-0.jsonl", "x-1.jsonl", "x-old.jsonl"]
    assert [one.row for one in read_jsonl(path, of)] == [0, 1, 2]


def test_a_failing_writer_of_chunks_leaves_what_was_there(tmp_path: Path) -> None:
    of, path = spec(top_k=3), tmp_path / "x-CHUNK_ID.jsonl"
    write_jsonl(path, [sample(row, of, 2) for row in range(4)], samples_per_chunk=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def failing() -> Any:
        yield from (sample(row, of, 1) for row in range(5))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, failing(), samples_per_chunk=2)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_chunks_that_are_half_replaced_are_not_read(tmp_path: Path) -> None:
    """Killed at any rename or removal, number 0 is missing."""
    of, path = spec(top_k=3), tmp_path / "x-CHUNK_ID.jsonl"
    write_jsonl(path, [sample(row, of, 2) for row in range(3)], samples_per_chunk=1)
    steps = 0
    while True:
        copy = tmp_path / f"copy-{steps}"
        copy.mkdir()
        for number in range(3):
            shutil.copy(tmp_path / f"x-{number}.jsonl", copy)
            shutil.copy(tmp_path / "x-0.jsonl", copy / f".new-{number}")
        target = copy / "x-CHUNK_ID.jsonl"
        program = [sys.executable, "-c", KILLED, str(steps), str(target)]
        done = subprocess.run(program, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        if not done.returncode:
            break
        steps += 1
        if steps > 1:  # the first was before anything was done
            with pytest.raises(StoreError, match=r"x-0.jsonl"):
                chunk_paths(target)
    assert steps == 6 and len(chunk_paths(target)) == 3


KILLED = """
import os, sys
from pathlib import Path
from nemo_kd.store.tools.chunks import publish_chunks
left, target = int(sys.argv[1]), Path(sys.argv[2])

def killing(event, _):
    global left
    if event in ("os.remove", "os.rename"):
        if not left:
            os._exit(9)
        left -= 1

sys.addaudithook(killing)
publish_chunks(target, [target.parent / f".new-{i}" for i in range(3)])
"""


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "nothing.jsonl", spec()))
    with pytest.raises(StoreError, match=r"x-0.jsonl does not exist"):
        list(read_jsonl(tmp_path / "x-CHUNK_ID.jsonl", spec()))
    with pytest.raises(StoreError, match=r"temperature 1.0 only"):
        list(read_jsonl(tmp_path / "nothing.jsonl", spec(temperatures=(1.0, 2.0))))


def test_a_failing_writer_leaves_no_file(tmp_path: Path) -> None:
    def samples() -> Any:
        yield sample(0, spec(), 2)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "x.jsonl", samples())
    assert not list(tmp_path.iterdir())
