"""Spoiled files are errors of this package or data: never another exception, a hang or a gigabyte.

Each case takes at most 2 s and 1 GiB. The slow sizes make 100,000 cases.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nemo_kd.checkpoints import open_checkpoint
from nemo_kd.errors import NemoKDError
from nemo_kd.store import Store, read_jsonl, verify, write_jsonl
from tests.attacks.bounds import bounded
from tests.checkpoints import models
from tests.store.samples import sample, spec, store

Edit = tuple[str, int, Any]
NASTY: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        1 << 31,
        1 << 62,
        1 << 64,
        1.5,
        1e308,
        10**400,
        "",
        "x",
        "\x1b",
        "../x",
    ),
    *([], {}, [[]], [None], {"a": {}}, "x" * 10_000, [1.0] * 1000),
]
TOKENS = [b"1e999", b"[[[[", b"}", b"null", b"-1", b'"\\ud800"', b"\xff", b"\0", b'{"a":', b"NaN"]
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1]
PLACE = st.integers(0, (1 << 32) - 1)
IN_PLACE = st.one_of(
    st.tuples(st.just("set"), PLACE, st.binary(min_size=1, max_size=9)),
    st.tuples(
        st.just("set"),
        PLACE,
        st.builds(
            lambda n, size: struct.pack("<Q", n)[:size],
            st.sampled_from(NUMBERS),
            st.sampled_from([1, 2, 4, 8]),
        ),
    ),
)
ANYWHERE = st.one_of(
    IN_PLACE,
    st.tuples(st.just("insert"), PLACE, st.sampled_from(TOKENS)),
    st.tuples(st.just("delete"), PLACE, st.integers(1, 40)),
    st.tuples(st.just("cut"), PLACE, st.none()),
)


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """Apply edits at places that are taken modulo the length."""
    spoiled = bytearray(data)
    for kind, place, value in edits:
        at = place % max(len(spoiled), 1)
        if kind == "set":
            value = value[: len(spoiled) - at]
            spoiled[at : at + len(value)] = value
        elif kind == "insert":
            spoiled[at:at] = value
        else:
            del spoiled[at : at + value if kind == "delete" else None]
    return bytes(spoiled)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value within a JSON value, containers too."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items if isinstance(value, dict | list) else ():
        yield from leaves(item, (*path, key)) if isinstance(item, dict | list) else [(*path, key)]


def with_values(value: Any, changes: list[tuple[int, int]]) -> bytes:
    """The JSON value with nasty values in some places."""
    for place, number in changes:
        paths = list(leaves(value))
        if paths:
            *way, last = paths[place % len(paths)]
            holder = value
            for key in way:
                holder = holder[key]
            holder[last] = copy.deepcopy(NASTY[number % len(NASTY)])
    return json.dumps(value).encode()


def fuzz(cases: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Run `check` on cases that are the same each time, within the bounds."""

    def one(case: Any) -> None:
        with bounded(), suppress(NemoKDError):
            check(case)

    configured = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    configured(given(strategy)(one))()


def sizes(fast: int, slow: int) -> pytest.MarkDecorator:
    large = pytest.param(slow, marks=pytest.mark.slow, id=f"{slow}, slow")
    return pytest.mark.parametrize("cases", [fast, large])


def read(directory: Path) -> None:
    """Verify a store, which must not raise, then read all of it."""
    list(verify(directory))
    for _ in Store(directory):
        pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("fuzz") / "store", spec(rows_per_shard=7), rows=3)


CHANGES = st.lists(st.tuples(PLACE, PLACE), min_size=1, max_size=3)


@sizes(400, 15_000)
def test_values_of_a_manifest(whole: Path, tmp_path: Path, cases: int) -> None:
    directory = shutil.copytree(whole, tmp_path / "s")
    text = (whole / "manifest.json").read_text()

    def check(changes: list[tuple[int, int]]) -> None:
        (directory / "manifest.json").write_bytes(with_values(json.loads(text), changes))
        read(directory)

    fuzz(cases, CHANGES, check)


def fuzz_files(
    cases: int,
    directory: Path,
    files: dict[Path, bytes],
    strategy: st.SearchStrategy[list[Edit]],
) -> None:
    """Read the store in `directory` with edits of one of its `files` at a time."""

    def check(case: tuple[Path, list[Edit]]) -> None:
        name, edits = case
        (directory / name).write_bytes(edited(files[name], edits))
        try:
            read(directory)
        finally:
            (directory / name).write_bytes(files[name])

    fuzz(cases, st.tuples(st.sampled_from(sorted(files)), strategy), check)


@sizes(400, 15_000)
def test_bytes_of_the_json_files(whole: Path, tmp_path: Path, cases: int) -> None:
    directory = shutil.copytree(whole, tmp_path / "s")
    files = {p.relative_to(whole): p.read_bytes() for p in sorted(whole.rglob("*.json"))}
    fuzz_files(cases, directory, files, st.lists(ANYWHERE, min_size=1, max_size=3))


@pytest.mark.parametrize("profile", ["plain", "compact", "top_p"])
@sizes(250, 10_000)
def test_bytes_of_indices_and_records(tmp_path: Path, profile: str, cases: int) -> None:
    options = {"p": 0.9} if profile == "top_p" else {}
    of = spec(rows_per_shard=7, profile=profile, profile_options=options)
    directory = store(tmp_path / "s", of, rows=3)
    paths = [p for p in sorted(directory.rglob("*")) if p.suffix in (".idx", ".bin")]
    files = {p.relative_to(directory): p.read_bytes() for p in paths}
    fuzz_files(cases, directory, files, st.lists(IN_PLACE, min_size=1, max_size=4))


@sizes(1000, 20_000)
def test_lines_of_jsonl(tmp_path: Path, cases: int) -> None:
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [sample(0, spec(), answers=2)])
    line = path.read_bytes()

    def check(case: tuple[list[Edit], list[tuple[int, int]]]) -> None:
        edits, changes = case
        text = with_values(json.loads(line), changes) if changes else line
        path.write_bytes(edited(text, edits))
        list(read_jsonl(path, spec()))

    fuzz(cases, st.tuples(st.lists(ANYWHERE, max_size=2), st.one_of(st.just([]), CHANGES)), check)


@sizes(400, 20_000)
def test_headers_of_gguf(tmp_path: Path, cases: int) -> None:
    path = models.write_gguf(models.llama("tied_grouped"), tmp_path / "model.gguf")
    data = path.read_bytes()
    start = data.index(b"tokenizer.ggml.tokens")

    def check(case: tuple[list[Edit], bool]) -> None:
        edits, head = case
        end = start if head else len(data)
        path.write_bytes(edited(data[:end], edits) + data[end:])
        checkpoint = open_checkpoint(path)
        checkpoint.tensor("model.norm.weight")

    fuzz(cases, st.tuples(st.lists(ANYWHERE, min_size=1, max_size=3), st.booleans()), check)
