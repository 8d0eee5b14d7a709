"""Damage is reported with its place, and never read as data."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.store import Store, StoreError
from nemo_kd.store.tools.verify import verify
from tests.store.samples import spec, store

PROFILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compact": {"profile": "compact"},
    "top_p": {"profile": "top_p", "profile_options": {"p": 0.9}},
}


def everything(directory: Path) -> list[object]:
    return [
        (s.row, s.input_ids.tolist(), s.topk.ids.tolist(), s.topk.logits.tolist())
        for s in Store(directory)
    ]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_whole_store_has_no_problems(tmp_path: Path, profile: str) -> None:
    assert list(verify(store(tmp_path / "s", spec(**PROFILES[profile])))) == []


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "places", [20, pytest.param(200, marks=pytest.mark.slow, id="200 places, slow")]
)
def test_flipped_bits_and_truncations_are_found_and_never_become_data(
    tmp_path: Path, profile: str, places: int
) -> None:
    whole = store(tmp_path / "whole", spec(**PROFILES[profile]))
    expected = everything(whole)
    generator = random.Random(0)
    files = sorted(
        path.relative_to(whole)
        for path in whole.rglob("*")
        if path.is_file() and path.stat().st_size
    )
    for place in range(places):
        file = generator.choice(files)
        broken = tmp_path / f"broken-{place}"
        shutil.copytree(whole, broken)
        data = bytearray((broken / file).read_bytes())
        at = generator.randrange(len(data))
        if place % 4:
            data[at] ^= 1 << generator.randrange(8)
        else:
            del data[at:]
        (broken / file).write_bytes(data)
        problems = list(verify(broken))
        assert problems, (file, at)
        with contextlib.suppress(StoreError):  # refused is as good
            assert everything(broken) == expected, (file, at)
        shutil.rmtree(broken)


def test_problems_name_file_row_and_position(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec())
    file = directory / "segment-00001" / "topk_ids.bin"
    ids = np.fromfile(file, np.uint16)
    ids[1] = ids[0]  # row 3: the first answer token has one id twice
    ids.tofile(file)
    text = "\n".join(map(str, verify(directory)))
    assert "segment-00001/topk_ids.bin" in text and "row 3, position 3" in text
    assert "the same id twice" in text


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("segment-00000/lse.bin", lambda data: data[:-1], "lse.bin has"),
        ("segment-00000/tokens.idx", None, "tokens.idx is missing"),
        ("manifest.json", lambda data: data[: len(data) // 2], "manifest.json"),
        ("manifest.json", lambda data: data.replace(b'"version":2', b'"version":9'), "version 9"),
    ],
)
def test_a_reader_refuses_what_is_not_whole(
    tmp_path: Path, file: str, change: object, message: str
) -> None:
    directory = store(tmp_path / "s", spec())
    path = directory / file
    if change is None:
        path.unlink()
    else:
        data = path.read_bytes()
        changed = change(data.replace(b'"version": 2', b'"version":2'))  # type: ignore[operator]
        assert changed != data
        path.write_bytes(changed)
    with pytest.raises(StoreError, match=message):
        everything(directory)


def test_a_student_of_another_kind_is_refused(tmp_path: Path) -> None:
    opened = Store(store(tmp_path / "s", spec(temperatures=(1.0, 2.0))))
    opened.check(tokenizer_fingerprint="a" * 64, vocab_size=500, temperature=2.0)
    for key, value, message in (
        ("tokenizer_fingerprint", "c" * 64, "tokenizer is 'aaaa.* in the store, expected 'cccc"),
        ("vocab_size", 501, "vocabulary size is 500 in the store, expected 501"),
        ("temperature", 4.0, r"has \[1.0, 2.0\].* with dump.temperatures=\[1.0, 2.0, 4.0\]$"),
    ):
        with pytest.raises(StoreError, match=message):
            opened.check(**{key: value})  # type: ignore[arg-type]


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such directory"):
        Store(tmp_path / "nothing")
    with pytest.raises(StoreError, match=r"neither manifest\.json nor shards"):
        Store(tmp_path)


def test_manifest_has_no_paths_or_times(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec())
    text = json.dumps(json.loads((directory / "manifest.json").read_text()))
    assert str(tmp_path) not in text
