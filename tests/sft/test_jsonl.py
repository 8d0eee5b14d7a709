"""JSONL rows: those of the file as it is now, and NeMo's where NeMo reads it right."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.sft import JsonlFile, RowError, hashed, open_files

GOOD = {"input": "Größe 答", "output": "a\u2028b\x85c"}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(path: Path) -> list[Any]:
    file = JsonlFile(path)
    return [file[i] for i in range(len(file))]


def lines(*values: Any, end: str = "\n") -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + end for value in values)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"input": "a", "output": "b", "output": "c"}', "output"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content"),
        ('{"in\\u0070ut": "a", "input": "b"}', "input"),
        ('[{"a": 1}, {"b": {"": 0, "": 0}}]', ""),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_appears_twice_is_a_bad_row(
    tmp_path: Path, line: str, key: str, name: str
) -> None:
    """The standard library keeps the last value, and drops the other without a word."""
    rows_of = [lines(GOOD).strip(), line, lines(GOOD).strip()]
    text = "\n".join(rows_of) if name == "a.jsonl" else f"[{', '.join(rows_of)}]"
    file = open_files(write(tmp_path / name, text))
    assert [file[0], file[2]] == [GOOD, GOOD]
    with pytest.raises(RowError, match=rf"row 1.*: the key '{key}' appears twice; remove one"):
        file[1]


@pytest.fixture(scope="module")
def nemo() -> Any:
    from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import JSONLMemMapDataset

    return lambda path: JSONLMemMapDataset([str(path)], workers=1)


@pytest.mark.parametrize(
    "text",
    [
        lines(GOOD, {"a": 1}, [1, 2], 3, None, "x"),
        lines(GOOD, GOOD)[:-1],
        lines(GOOD, GOOD) + "\n\n",
        lines(GOOD, GOOD, end="\r\n"),
        lines(GOOD, GOOD, end=" \t\n"),
        lines(GOOD, {"a": float("nan")}),
        "7",
    ],
    ids=["values", "no last newline", "blank at the end", "CRLF", "spaces", "NaN", "one byte"],
)
def test_rows_are_nemos(nemo: Any, tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.jsonl", text)
    theirs = nemo(path)
    found = [theirs[i] for i in range(len(theirs))]
    assert repr(rows(path)) == repr(found)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.text(max_size=9) | st.integers(), min_size=1, max_size=9),
    block=st.integers(1, 30),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_any_rows_in_any_blocks(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], block: int, end: str, last: bool
) -> None:
    text = lines(*values, end=end)
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    write(path, text if last else text.removesuffix(end))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashed, "BLOCK", block)
        file = JsonlFile(path)
    assert [file[i] for i in range(len(file))] == values
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_lies_beside_the_file_is_neither_read_nor_touched(nemo: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(1, 2))
    nemo(path)
    stale = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.idx.*")}
    assert len(stale) == 2
    write(path, lines(*range(5), "longer"))
    assert len(nemo(path)) == 2  # what NeMo makes of it
    assert rows(path) == [0, 1, 2, 3, 4, "longer"]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.idx.*")} == stale
    assert len(list(tmp_path.iterdir())) == 3


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    """NeMo refuses the first row."""
    assert rows(write(tmp_path / "a.jsonl", "\ufeff" + lines(GOOD, 1))) == [GOOD, 1]
    with pytest.raises(RowError, match="has no rows: all of its lines are blank"):
        JsonlFile(write(tmp_path / "b.jsonl", "\ufeff"))


def test_a_blank_line_keeps_its_number(tmp_path: Path) -> None:
    file = JsonlFile(write(tmp_path / "a.jsonl", "1\n\n \r\n4\n\r\n \n"))
    assert len(file) == 4 and file[0] == 1 and file[3] == 4
    for row in (1, 2):
        with pytest.raises(RowError, match=rf"a.jsonl, row {row}: not JSON \(a blank line\)"):
            file[row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "\xff"}', "row 1: not UTF-8 .invalid start byte at byte 7 of the line.; save"),
        (b'{"a": 1', "row 1: not JSON .Expecting ',' delimiter.*fix or remove the line"),
        (b"\x00\x00", "row 1: not JSON"),
        (b"[" * 100_000, "row 1: not JSON .maximum recursion depth"),
        ('{"a": 1}'.encode("utf-16"), "row 1: not UTF-8"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = JsonlFile(write(tmp_path / "a.jsonl", b"1\n" + line.replace(b"\n", b"") + b"\n2\n"))
    assert file[0] == 1 and file[2] == 2
    with pytest.raises(RowError, match=message):
        file[1]


def test_a_file_without_rows_or_that_cannot_be_read_in_any_order(tmp_path: Path) -> None:
    for text in ("", "\n", "\r\n \n"):
        what = "all of its lines are blank" if text else "the file is empty"
        with pytest.raises(RowError, match=f"a.jsonl has no rows: {what}"):
            JsonlFile(write(tmp_path / "a.jsonl", text))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(RowError, match="is not a regular file"):
            JsonlFile(path)
    with pytest.raises(FileNotFoundError):
        JsonlFile(tmp_path / "none")


def test_rows_are_those_that_were_hashed_or_the_change_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(1, 2, 3))
    file = JsonlFile(path)
    file.check_unchanged()
    os.utime(path, ns=(1, 1))  # touched
    file.check_unchanged()
    copy = write(tmp_path / "copy", path.read_bytes())
    os.replace(copy, path)  # copied again
    file.check_unchanged()
    assert [file[i] for i in range(3)] == [1, 2, 3]
    with path.open("r+") as inside:
        inside.write("7")
    with pytest.raises(RowError, match="has changed since this run began to read it"):
        file[0]  # not 7
    write(path, lines(1, 2, 3))
    assert file[0] == 1
    with path.open("a") as appending:
        appending.write("4\n")
    with pytest.raises(RowError, match="has changed since this run began to read it"):
        file.check_unchanged()
    file = JsonlFile(path)
    path.unlink()
    assert file[3] == 4  # from the file that was hashed
    with pytest.raises(RowError, match=r"has changed .*No such file"):
        file.check_unchanged()
    write(path, lines(1, 2, 3, 4))
    file = JsonlFile(path)
    os.truncate(path, 4)
    with pytest.raises(RowError, match="has changed"):
        file[3]


def test_another_process_opens_it_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(*range(9)))
    file = JsonlFile(path)
    text = pickle.dumps(file)
    assert pickle.loads(text)[8] == 8
    write(path, lines(*range(8)))
    with pytest.raises(RowError, match="has changed"):
        pickle.loads(text)


def test_row_numbers_are_numpys_too(tmp_path: Path) -> None:
    file = JsonlFile(write(tmp_path / "a.jsonl", lines(5, 6)))
    assert file[np.int64(1)] == 6  # type: ignore[index]
    with pytest.raises(IndexError):
        file[2]
