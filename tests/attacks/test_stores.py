"""Hostile stores: each is refused in one line, in bounded time and memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.files import canonical_json
from nemo_kd.store import Manifest, Store, StoreError, StoreSpec, verify
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.codecs.base import Arrays
from nemo_kd.store.manifest import MANIFEST, SHARD, SPEC
from nemo_kd.store.writer import StoreWriter
from tests.attacks.bounds import bounded
from tests.cli.test_cli import nemo_kd
from tests.store.samples import sample, spec, store

Change = Callable[[dict[str, Any]], Any]


def read_all(directory: Path) -> None:
    """Open a store and decode each of its samples."""
    for _ in Store(directory):
        pass


def changed(name: str, change: Change) -> Callable[[Path], None]:
    """Edit the JSON file `name` of a store."""

    def edit(directory: Path) -> None:
        value = json.loads((directory / name).read_text())
        change(value)
        (directory / name).write_text(json.dumps(value))

    return edit


def replaced(name: str, text: bytes) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        (directory / name).write_bytes(text)

    return edit


def in_spec(**values: Any) -> Callable[[Path], None]:
    return changed(MANIFEST, lambda manifest: manifest["spec"].update(values))


def in_shard(**values: Any) -> Callable[[Path], None]:
    return changed(MANIFEST, lambda manifest: parts(manifest)[0].update(values))


def parts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manifest.get("segments") or manifest["shards"]
    return found


def fifo(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return make


def number(digits: int) -> Callable[[Path], None]:
    """`10**digits` as a temperature, written as a number of JSON."""

    def edit(directory: Path) -> None:
        text = (directory / MANIFEST).read_text()
        assert '"temperatures": [\n   1.0\n  ]' in text
        text = text.replace("   1.0\n", f"   1.0, 1{'0' * digits}\n")
        (directory / MANIFEST).write_text(text)

    return edit


DEEP: Any = [None]
for _ in range(40):
    DEEP = [DEEP]

# name → how the store is spoiled, and what the error says
MANIFESTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "deep JSON": (replaced(MANIFEST, b"[" * 1_000_000), "not readable as JSON"),
    "deep value": (in_spec(teacher={"a": DEEP}), "nested more than 32 levels deep"),
    "a temperature of 400 digits": (number(400), "too large"),
    "a temperature of 40,000 digits": (number(40_000), "out of range"),
    "an infinite temperature": (in_spec(temperatures=[1.0, float("inf")]), "not readable as JSON"),
    "300,000 temperatures": (
        in_spec(temperatures=[1.0 + i / 1e6 for i in range(300_000)]),
        "at most 64 temperatures",
    ),
    "a text as temperatures": (in_spec(temperatures="1"), "must be numbers"),
    "a list as profile": (in_spec(profile=["plain"]), "profile must be a name"),
    "an object as library": (in_spec(tokenizer={"library": {}}), "Expected `str | null`"),
    "a number as path": (in_spec(tokenizer={"path": 7}), "Expected `str | null`"),
    "a list as teacher": (in_spec(teacher=[]), "teacher must be a mapping"),
    "a top-K of billions": (in_spec(top_k=1 << 31, vocab_size=1 << 32), "top_k must be at most"),
    "a vocabulary beyond 32 bits": (in_spec(vocab_size=1 << 40), "vocab_size must be in"),
    "an integer of 70 bits": (in_spec(source={"rows": 1 << 70}), "more than 64 bits"),
    "a lone surrogate": (
        replaced(MANIFEST, rb'{"format": "nemo-kd store", "version": 1, "spec": "\ud800"}'),
        "not readable as JSON",
    ),
    "no UTF-8": (replaced(MANIFEST, b'{"format": "\xff"}'), "not readable as JSON"),
    "empty": (replaced(MANIFEST, b""), "not readable as JSON"),
    "a billion samples": (in_shard(samples=10**9), "totals"),
    "negative samples": (in_shard(samples=-1), "Expected `int` >= 0"),
    "true as a count": (in_shard(tokens=True), "Expected `int`"),
    "a number of 70 bits": (in_shard(tokens=1 << 70), "Expected `int`"),
    "no hash": (
        changed(MANIFEST, lambda m: parts(m)[0]["files"]["rows.bin"].update(sha256="x")),
        "matching regex",
    ),
    "a thousand files": (
        in_shard(files={f"{i}": {"bytes": 0, "sha256": "0" * 64} for i in range(1000)}),
        "Expected `object` of length <= 64",
    ),
    "a path as a name": (in_shard(name="../../etc"), "are not"),
    "millions of empty lists": (
        replaced(
            MANIFEST,
            b'{"format": "nemo-kd store", "version": 1, "spec": {}, "totals": [' + b"[]," * 9**7,
        ),
        "not readable as JSON",
    ),
    "a large spec": (in_spec(teacher={"name": "x" * (5 << 20)}), "its spec has more than"),
    "an unknown key": (changed(MANIFEST, lambda m: m.update(more=[])), "unknown field `more`"),
    "another format": (changed(MANIFEST, lambda m: m.update(format="x")), "not the manifest"),
    "another version": (changed(MANIFEST, lambda m: m.update(version=99)), "format version 99"),
    "a text as version": (changed(MANIFEST, lambda m: m.update(version="1")), "Expected `int`"),
    "a FIFO": (fifo(MANIFEST), "has not finished"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_hostile_manifest_is_one_error(tmp_path: Path, kind: str) -> None:
    spoil, message = MANIFESTS[kind]
    directory = store(tmp_path / "s", spec())
    spoil(directory)
    with bounded():
        with pytest.raises(StoreError) as caught:
            Store(directory)
        printed = nemo_kd("inspect", directory, fails=True)
        list(verify(directory))
    assert message in str(caught.value)
    assert len(printed.splitlines()) == 1 and len(printed) < 5000


def a_billion_samples(directory: Path) -> None:
    """The manifest agrees with itself and with the sizes of the files."""

    def edit(manifest: dict[str, Any]) -> None:
        part = parts(manifest)[0]
        manifest["totals"]["samples"] += 10**9 - part["samples"]
        part["samples"] = 10**9
        if "rows_per_segment" in manifest:
            manifest["rows_per_segment"] = 10**12
        else:
            manifest["spec"]["rows_per_shard"] = 10**12

    changed(MANIFEST, edit)(directory)


def index_of_a_billion(directory: Path) -> None:
    """An index whose header has as many samples as the manifest says."""
    a_billion_samples(directory)
    for path in directory.glob("*/*.idx"):
        text = bytearray(path.read_bytes())
        text[18:34] = struct.pack("<QQ", 10**9, 10**9 + 1)
        path.write_bytes(text)


@pytest.mark.parametrize("spoil", [a_billion_samples, index_of_a_billion])
def test_sizes_are_compared_before_memory_is_taken(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    directory = store(tmp_path / "s", spec())
    spoil(directory)
    with bounded():
        with pytest.raises(StoreError):
            read_all(directory)
        assert list(verify(directory))


def test_a_small_file_does_not_decode_to_gigabytes(tmp_path: Path) -> None:
    """A profile of variable length: two bytes for each answer token of up to 65,535 ids."""
    of = spec(top_k=65_535, vocab_size=70_000, profile="top_p", profile_options={"p": 0.5})
    answers = 100_000
    arrays: Arrays = {
        "kept": np.ones(answers, np.uint16),
        "topk_ids": np.zeros(answers, np.int32),
        "topk_logits": np.zeros(answers, np.uint16),
        "lse": np.zeros(answers, np.float32),
    }
    with bounded(), pytest.raises(ValueError, match="entries per sample"):
        codec_of(of).decode(arrays, answers)


@pytest.mark.parametrize("name", [SPEC, f"shard-00000/{SHARD}", "shard-00000/rows.bin"])
def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "s"
    with StoreWriter(directory, spec()).shard(0) as out:
        out.add(sample(0, spec(), answers=2))
    fifo(name)(directory)
    with bounded():
        if name == SPEC:
            with pytest.raises(StoreError, match="not a regular file"):
                StoreWriter(directory, spec())
        else:
            assert StoreWriter(directory, spec()).complete_shard(0) is None


def test_a_fifo_in_a_finished_store_is_reported(tmp_path: Path) -> None:
    for number, pattern in enumerate((SPEC, f"*/{SHARD}", "*/rows.bin", "*/tokens.idx")):
        directory = store(tmp_path / str(number), spec())
        name = next(directory.glob(pattern)).relative_to(directory)
        fifo(str(name))(directory)
        with bounded():
            assert any(str(name) in problem.file for problem in verify(directory))
            if pattern != SPEC:
                with pytest.raises(StoreError):
                    read_all(directory)


def test_a_spec_of_python_s_is_checked_too() -> None:
    common: dict[str, Any] = {"top_k": 5, "vocab_size": 50}
    wrong: dict[str, Any]
    for wrong in (
        {"temperatures": [1.0, 10**400]},
        {"temperatures": [1.0, "x"]},
        {"temperatures": 1.0},
        {"profile": ["plain"]},
        {"tokenizer": {"library": []}},
        {"teacher": {"name": "\ud800"}},
        {"teacher": {"name": float("nan")}},
        {"teacher": {"name": DEEP}},
        {"source": {"rows": 1 << 80}},
    ):
        with pytest.raises(StoreError):
            StoreSpec(**{**common, **wrong})


def test_show_refuses_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec())
    for path in directory.glob("*/shard.json"):
        path.write_text(path.read_text())

    def smaller(value: dict[str, Any]) -> None:
        value["spec"].update(vocab_size=6)

    changed(MANIFEST, smaller)(directory)
    manifest = Manifest.read(directory)
    for path in directory.glob("*/shard.json"):
        value = json.loads(path.read_text())
        value["spec_sha256"] = getattr(manifest, "spec_fingerprint", manifest.spec.fingerprint)
        path.write_text(canonical_json(value))
    assert "has ids outside [0, 6)" in nemo_kd("show", directory, 3, "--ids", fails=True)
