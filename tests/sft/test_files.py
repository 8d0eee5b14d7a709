"""SFT files: the same rows from every kind of file, and clear errors for what is none."""

from __future__ import annotations

import datetime
import decimal
import gzip
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.files import FullDiskError
from nemo_kd.sft import RowError, RowFile, hashed, open_files
from nemo_kd.sft.hashed import DamagedFileError
from nemo_kd.sft.json_array import JsonArrayFile
from nemo_kd.sft.previews import first_row

datasets.disable_progress_bars()

Write = Callable[[Path, list[Any]], Path]

ROWS: list[dict[str, Any]] = [
    {"id": 1, "text": "Größe 答 🙂 \u202eعربي\u2028\x85", "score": 0.1, "ok": True, "system": None},
    {"id": -(2**63), "text": "", "score": -0.0, "ok": False, "system": "x\r\n\ty\n"},
    {"id": 2**63 - 1, "text": " \n\n", "score": 1e300, "ok": None, "system": ""},
]
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}]},
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "c1", "function": {"name": "w", "arguments": {"city": "Köln"}}},
                    {"id": "c2", "function": {"name": "t", "arguments": {"zone": 1}}},
                ],
            },
            {"role": "tool", "content": "7", "name": "w"},
            {"role": "assistant", "content": "7 °C", "weight": 1},
        ]
    },
    {"messages": []},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = path.with_suffix(".jsonl")
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_array(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Any], **options: Any) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_dataset(path: Path, rows: list[Any], shards: int = 1) -> Path:
    path = path.with_suffix("")
    datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=shards)
    return path


KINDS: list[Write] = [write_jsonl, write_array, write_parquet, write_dataset]
all_kinds = pytest.mark.parametrize("write", KINDS)


def text_of(rows: list[Any]) -> str:
    """Return a text that differs for 1, 1.0 and true, and for 0.0 and -0.0."""
    return json.dumps(rows, sort_keys=True)


def values(file: RowFile) -> list[Any]:
    return [file[i] for i in range(len(file))]


@all_kinds
@pytest.mark.parametrize("rows", [ROWS, TALKS], ids=["fields", "messages"])
def test_a_row_has_the_same_value_in_every_kind_of_file(
    tmp_path: Path, write: Write, rows: list[Any]
) -> None:
    file = open_files(write(tmp_path / "a", rows))
    assert text_of(values(file)) == text_of(rows)
    assert first_row(file.path) == rows[0]


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "i": st.none() | st.integers(-(2**63), 2**63 - 1),
                "x": st.none() | st.floats(allow_nan=False),
                "t": st.none() | st.text(st.characters(exclude_categories=["Cs"])),
                "l": st.none() | st.lists(st.none() | st.booleans()),
            }
        ),
        min_size=1,
    ),
    data=st.data(),
)
def test_any_values(tmp_path_factory: pytest.TempPathFactory, rows: Any, data: Any) -> None:
    write = data.draw(st.sampled_from(KINDS))
    path = tmp_path_factory.mktemp("any") / "a"
    assert text_of(values(open_files(write(path, rows)))) == text_of(rows)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.recursive(st.integers() | st.text(), st.lists, max_leaves=5)),
    indent=st.none() | st.integers(0, 3),
    ascii=st.booleans(),
    block=st.integers(4, 30),
    bom=st.booleans(),
)
def test_any_array_in_any_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    indent: int | None,
    ascii: bool,
    block: int,
    bom: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps([0, *rows], indent=indent, ensure_ascii=ascii)
    path.write_text("\ufeff" * bom + text, errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashed, "BLOCK", block)
        file = JsonArrayFile(path)
    assert values(file) == [0, *rows]
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "row 0: not JSON .the file ends before its array does"),
        ('[{"a": 1}', "row 1: not JSON .the file ends before"),
        ('[{"a": 1} {"a": 2}]', "row 1: not JSON .expected , or ] at byte 10"),
        ('[{"a": 1},]', "row 1: not JSON .Expecting value at byte 10"),
        ('[{"a": 1}, {"b": }]', "row 1: not JSON .Expecting value at byte 17"),
        ('[{"a": "x}]', "row 0: not JSON .Unterminated string"),
        ("[1] [2]", "row 1: not JSON .a second value at byte 4"),
        ("[" * 100_000, "row 0: not JSON .maximum recursion depth"),
        ("[ ]", "has no rows"),
        ('{"data": [\n{"a": 1}]}', "first line is not a JSON value.*expected an array of rows"),
        ("{\n}", "first line is not a JSON value"),
    ],
)
def test_a_file_that_is_no_array_of_rows(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RowError, match=message):
        open_files(tmp_path / "a.json")


def test_a_json_file_of_lines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a", ROWS).rename(tmp_path / "a.json")
    assert values(open_files(path)) == ROWS


@pytest.mark.parametrize(
    "text", ['[{"a": 1}, {"a": 2}]', '[\n  {"a": 1}\n]\n', '\ufeff[{"a": 1},\n']
)
def test_an_array_by_the_name_of_json_lines_is_to_be_renamed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RowError, match=r"begins as one JSON array: rename it to rows\.json, which"):
        open_files(path)
    path.write_text('[1, 2]\n{"a": 1}\n')  # a bad row, which on_bad_row may drop
    assert open_files(path)[1] == {"a": 1}


def test_not_utf8_in_an_array_is_an_error_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"a": "\xe4"}, {"a": 2}]')
    file = open_files(tmp_path / "a.json")
    assert file[1] == {"a": 2}
    with pytest.raises(RowError, match=r"a.json, row 0: not UTF-8 .* byte 7 of the row"):
        file[0]


def test_dates_and_decimal_numbers_are_text(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 7, 26, 12, 30, 0, 5, tzinfo=datetime.UTC)
    row = {
        "day": moment.date(),
        "time": moment.time(),
        "moment": moment,
        "local": [moment.replace(tzinfo=None)],
        "price": decimal.Decimal("1.50"),
    }
    expected = {
        "day": "2024-07-26",
        "time": "12:30:00.000005",
        "moment": "2024-07-26T12:30:00.000005+00:00",
        "local": ["2024-07-26T12:30:00.000005"],
        "price": "1.50",
    }
    for write in (write_parquet, write_dataset):
        assert open_files(write(tmp_path / "a", [row]))[0] == expected


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array(["x", None, "y"]).dictionary_encode(), ["x", None, "y"]),
        (pa.array([1, 2, 3], pa.uint8()), [1, 2, 3]),
        (pa.array([0.5, None, 1.5], pa.float32()), [0.5, None, 1.5]),
        (pa.array([0.5, None, 1.5], pa.float32()).cast(pa.float16()), [0.5, None, 1.5]),
        (pa.array([["a"], [], None], pa.large_list(pa.large_string())), [["a"], [], None]),
        (pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int8(), 2)), [[1, 2], [3, 4], [5, 6]]),
        (pa.nulls(3), [None] * 3),
        (
            pa.array([{"a": {"b": None, "c": [None]}}, {"a": None}, None]),
            [{"a": {"c": [None]}}, {}, None],
        ),
    ],
    ids=str,
)
def test_types_of_arrow(tmp_path: Path, array: pa.Array, expected: list[Any]) -> None:
    table = pa.table({"a": array})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = [row["a"] for row in values(open_files(tmp_path / "a.parquet"))]
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("value", [b"x", datetime.timedelta(1), [{"bytes": b"x"}]])
def test_a_column_that_json_does_not_have(tmp_path: Path, value: Any) -> None:
    path = write_parquet(tmp_path / "a", [{"text": "x", "image": value}])
    with pytest.raises(RowError, match=r"a.parquet: the column image has type .*; remove"):
        open_files(path)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RowError, match="two columns 'a'"):
        open_files(tmp_path / "a.parquet")


def test_rows_of_many_row_groups_in_any_order(tmp_path: Path) -> None:
    rows = [{"i": i, "t": "x" * (i % 7)} for i in range(2500)]
    for size in (1, 7, 999, 10_000):
        file = open_files(write_parquet(tmp_path / "a", rows, row_group_size=size))
        order = random.Random(size).sample(range(len(rows)), len(rows))
        assert [file[i] for i in order] == [rows[i] for i in order]
    with pytest.raises(IndexError):
        file[2500]


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a", ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DamagedFileError, match=r"a.parquet is not a readable Parquet file"):
        open_files(path)
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])
    with pytest.raises(DamagedFileError, match=r"a.parquet is not a readable Parquet file"):
        open_files(path)[0]


def test_a_full_disk_is_no_fault_of_a_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a", [{"t": "x" * 1000}] * 5000)
    limit = (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    before, file = resource.getrlimit(resource.RLIMIT_FSIZE), open_files(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    try:
        with pytest.raises(FullDiskError, match=r"no space to decode .*a.parquet.*set TMPDIR"):
            file[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file[4999] == {"t": "x" * 1000}


def test_a_value_that_python_does_not_have_is_an_error_of_its_row(tmp_path: Path) -> None:
    days = pa.array([1, 10**8], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"day": days}), tmp_path / "a.parquet")
    file = open_files(tmp_path / "a.parquet")
    assert file[0] == {"day": "1970-01-02"}
    with pytest.raises(RowError, match=r"a.parquet, row 1: .*fix or remove the row"):
        file[1]


def test_a_damaged_saved_dataset(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", ROWS)
    (data,) = path.glob("*.arrow")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(DamagedFileError, match="is not a readable Arrow file"):
        open_files(path)
    data.unlink()
    with pytest.raises(DamagedFileError, match=r"a is incomplete: data-.*.arrow is missing"):
        open_files(path)


def test_a_saved_dataset_is_as_datasets_reads_it_and_nothing_is_written(tmp_path: Path) -> None:
    rows = [{"i": i, "messages": TALKS[i % 3]["messages"]} for i in range(50)]
    data = datasets.Dataset.from_list(rows).shuffle(seed=1).select(range(40))
    data.save_to_disk(tmp_path / "a", num_shards=3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    file = open_files(tmp_path / "a")
    found = values(file)
    loaded = datasets.load_from_disk(tmp_path / "a")
    assert [row["i"] for row in found] == loaded["i"] == data["i"]
    assert [row["messages"] for row in found] == [rows[i]["messages"] for i in data["i"]]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert file.files == [{"name": "a", "rows": 40, "sha256": file.sha256}]


def test_an_index_file_of_old_versions_of_datasets(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", ROWS)
    plain = open_files(path).sha256
    indices = pa.table({"indices": pa.array([2, 0], pa.uint64())})
    with pa.ipc.new_stream(path / "indices.arrow", indices.schema) as writer:
        writer.write_table(indices)
    state = json.loads((path / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (path / "state.json").write_text(json.dumps(state))
    file = open_files(path)
    assert values(file) == [ROWS[2], ROWS[0]] and file.sha256 != plain


def test_the_hash_of_a_saved_dataset_is_that_of_its_arrow_files(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", ROWS, shards=2)
    parts = sorted(path.glob("*.arrow"))
    hashes = "".join(hashlib.sha256(part.read_bytes()).hexdigest() for part in parts)
    assert open_files(path).sha256 == hashlib.sha256(hashes.encode()).hexdigest()


@all_kinds
def test_several_files_are_one_sequence(tmp_path: Path, write: Write) -> None:
    first = write(tmp_path / "b", ROWS)
    second = write_jsonl(tmp_path / "c", TALKS)
    file = open_files([second, str(first)])
    assert values(file) == [*TALKS, *ROWS]
    assert file.where(2) == f"{second}, row 2" and file.where(3) == f"{first}, row 0"
    assert [each["name"] for each in file.files] == [second.name, first.name]
    assert [each["rows"] for each in file.files] == [3, 3]
    hashes = open_files(second).sha256 + open_files(first).sha256
    assert file.sha256 == hashlib.sha256(hashes.encode()).hexdigest()
    assert file.path.name == "c.jsonl and 1 more"
    with pytest.raises(IndexError):
        file[6]


def test_a_glob_is_sorted_and_one_match_is_that_file(tmp_path: Path) -> None:
    for name, row in (("b-2", 2), ("b-10", 10), ("a[1]", 1)):
        write_jsonl(tmp_path / name, [row])
    assert values(open_files(f"{tmp_path}/b-*.jsonl")) == [10, 2]
    assert values(open_files([f"{tmp_path}/b-2*", f"{tmp_path}/a*"])) == [2, 1]
    assert values(open_files(tmp_path / "a[1].jsonl")) == [1]  # exists: not a glob
    assert open_files(f"{tmp_path}/b-*.jsonl").path.name == "b-*.jsonl"
    one, path = open_files(f"{tmp_path}/b-1*.jsonl"), tmp_path / "b-10.jsonl"
    assert one.path == path and one.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_jsonl(tmp_path / "deep" / "er" / "c", [3])
    assert values(open_files(f"{tmp_path}/deep/**/*.jsonl")) == [3]


def test_paths_that_give_no_file_or_one_twice(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a", ROWS)
    os.link(path, tmp_path / "b.jsonl")
    os.symlink(path, tmp_path / "c.jsonl")
    given: list[tuple[str | Sequence[str | Path], str]] = [
        ([path, path], r"a.jsonl twice"),
        ([path, f"{tmp_path}/a*"], r"a.jsonl twice"),
        ([path, tmp_path / "b.jsonl"], r"b.jsonl and .*a.jsonl, the same file"),
        (f"{tmp_path}/[ac]*", r"c.jsonl and .*a.jsonl, the same file"),
    ]
    for twice, message in given:
        with pytest.raises(RowError, match=message):
            open_files(twice)
    wrong: list[tuple[str | Path | list[Path], str]] = [
        (f"{tmp_path}/x*.jsonl", r"no file matches .*/x\*.jsonl"),
        (tmp_path / "x.jsonl", "no SFT file at .*x.jsonl"),
        ([path, tmp_path / "x.jsonl"], "no SFT file at .*x.jsonl"),
        (
            "a.jsonl,b.jsonl",
            r"no SFT file at a.jsonl,b.jsonl \(in .*\); several files are a list, \[a.jsonl,b",
        ),
        ([], "the list of SFT files is empty"),
        ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl: SFT files are read from disk"),
    ]
    for missing, message in wrong:
        with pytest.raises(RowError, match=message):
            open_files(missing)


def test_more_files_than_descriptors(tmp_path: Path) -> None:
    for i in range(150):
        (tmp_path / f"{i:03}.jsonl").write_text(f"{i}\n")
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120)); "
    read = (
        "from nemo_kd.sft import open_files; import sys; file = open_files(sys.argv[1]); "
        "print(sum(file[i] for i in [*range(150), *range(150)])); file.check_unchanged()"
    )
    done = subprocess.run(
        [sys.executable, "-c", few + read, f"{tmp_path}/*.jsonl"], capture_output=True, text=True
    )
    assert done.stdout.strip() == str(150 * 149), done.stderr


@all_kinds
def test_a_change_is_noticed(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "a", ROWS)
    alone, several = open_files(path), open_files([write_jsonl(tmp_path / "z", [1]), path])
    inside = [path] if path.is_file() else sorted(path.glob("*.arrow"))
    for each in inside:
        os.utime(each, ns=(1, 1))
    for file in (alone, several):
        file.check_unchanged()
        assert file[len(file) - 1] == ROWS[2]
    if path.is_dir():
        shutil.rmtree(path)
    write(path, ROWS[:2])
    for file in (alone, several):
        with pytest.raises(RowError, match="has changed since this run began to read it"):
            file.check_unchanged()


@all_kinds
def test_another_process_opens_it_anew(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "a", ROWS)
    paths: list[Path | list[Path]] = [path, [write_jsonl(tmp_path / "z", [1]), path]]
    texts = [pickle.dumps(open_files(each)) for each in paths]
    assert [pickle.loads(text)[-1 + len(pickle.loads(text))] for text in texts] == [ROWS[2]] * 2
    if path.is_dir():
        shutil.rmtree(path)
    write(path, TALKS)
    for text in texts:
        with pytest.raises(RowError, match="has changed"):
            pickle.loads(text)


def test_what_is_no_sft_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a", ROWS)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    zstd = tmp_path / "a.jsonl.zst"
    zstd.write_bytes(pa.compress(path.read_bytes(), "zstd", asbytes=True))
    lfs = tmp_path / "lfs.parquet"
    lfs.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "text.parquet").write_text("{}\n")
    os.mkfifo(tmp_path / "pipe")
    for wrong, message in (
        (packed, "a.jsonl.gz is compressed by gzip; decompress it"),
        (zstd, "a.jsonl.zst is compressed by Zstandard; decompress it"),
        (lfs, "is a pointer of Git LFS, not the data; run git lfs pull"),
        (tmp_path / "text.parquet", "is not a Parquet file"),
        (tmp_path / "pipe", "is not a regular file"),
        (next(write_dataset(tmp_path / "d", ROWS).glob("*.arrow")), "is an Arrow stream: expected"),
    ):
        with pytest.raises(RowError, match=message):
            open_files(wrong)
    empty = tmp_path / "empty.jsonl"
    for text, what in (("", "the file is empty"), ("\n \n", "all of its lines are blank")):
        empty.write_text(text)
        with pytest.raises(RowError, match=f"empty.jsonl has no rows: {what}"):
            open_files(empty)
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "none.parquet")
    with pytest.raises(RowError, match=r"none.parquet has no rows"):
        open_files(tmp_path / "none.parquet")


def test_directories_that_are_no_saved_dataset(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "splits")
    with pytest.raises(RowError, match="has the splits test, train: give one of them, such as"):
        open_files(tmp_path / "splits")
    assert len(open_files(tmp_path / "splits" / "train")) == 3
    (tmp_path / "hub" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "hub" / "data" / "train-0", ROWS)
    with pytest.raises(RowError, match=r"name the files in it, such as '.*/hub/data/\*.parquet'"):
        open_files(tmp_path / "hub")
    with pytest.raises(RowError, match=r"such as '.*/data/\*.parquet'"):
        open_files(tmp_path / "hub" / "data")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(RowError, match="nothing is a directory: expected SFT file"):
        open_files(tmp_path / "nothing")


def test_without_pyarrow_jsonl_works_and_parquet_says_what_to_install(tmp_path: Path) -> None:
    jsonl, parquet = write_jsonl(tmp_path / "a", ROWS), write_parquet(tmp_path / "a", ROWS)
    code = (
        "import sys; sys.modules['pyarrow'] = None; from nemo_kd.sft import open_files\n"
        "print(len(open_files(sys.argv[1])))\n"
        "try: open_files(sys.argv[2])\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, jsonl, parquet], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("3\n") and "pip install pyarrow" in done.stdout
