"""`verify` finds each kind of damage, and says file, row and position."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.store import Store, StoreError, verify
from nemo_kd.store.layout import seal, token_checksum, word_sums
from tests.store.samples import spec, store

ROW, POSITION = 4, 3  # second of shard 1; 3 tokens of prompt


def edit(path: Path, dtype: str, change: Callable[[Any], None]) -> None:
    values = np.fromfile(path, dtype)
    change(values)
    values.tofile(path)


def place(directory: Path) -> int:
    """Where the logits of row 4's first answer token begin in its shard's files."""
    return 5 * len(Store(directory)[3].topk.ids)


def swap(values: Any, i: int) -> None:
    values[[i, i + 1]] = values[[i + 1, i]]


TEACHER_DAMAGE: dict[str, tuple[str, str, Callable[[Any, int], None], str]] = {
    "an id twice": ("topk_ids", "<u2", lambda v, i: v.__setitem__(i + 1, v[i]), "same id twice"),
    "an id too large": ("topk_ids", "<u2", lambda v, i: v.__setitem__(i, 500), "nor absent: 500"),
    "rising": ("topk_logits", "<f2", swap, "descending order"),
    "NaN": ("topk_logits", "<f2", lambda v, i: v.__setitem__(i, np.nan), "not a number"),
    "mass": (
        "topk_logits",
        "<f2",
        lambda v, i: v.__setitem__(slice(i, i + 2), np.log(0.9)),
        "a probability mass above 1",
    ),
    "positive": ("topk_logits", "<f2", lambda v, i: v.__setitem__(i, 2.0), "above the log-sum-exp"),
    "lse": ("lse", "<f4", lambda v, i: v.__setitem__(i // 5, np.inf), "log-sum-exp that is not"),
}


@pytest.mark.parametrize("kind", TEACHER_DAMAGE)
def test_a_broken_rule_is_named_with_row_and_position(tmp_path: Path, kind: str) -> None:
    file, dtype, change, message = TEACHER_DAMAGE[kind]
    directory = store(tmp_path / "s", spec())
    start = place(directory)
    edit(directory / "segment-00001" / f"{file}.bin", dtype, lambda values: change(values, start))
    found = list(verify(Store(directory)))
    assert any(
        f"segment-00001/{file}.bin" == problem.file and "SHA-256" in problem.what
        for problem in found
    )
    faults = [problem for problem in found if problem.position is not None]
    assert {(fault.row, fault.position) for fault in faults} == {(ROW, POSITION)}
    assert any(message in fault.what and f"{file}.bin" in fault.file for fault in faults), faults
    if change is swap:  # the one change that a seal, a sum, cannot show
        return
    with pytest.raises(StoreError, match=f"row {ROW}.*{file}.bin has another checksum"):
        Store(directory)[ROW]
    assert Store(directory)[ROW - 1].row == ROW - 1  # no other sample is lost


def rename_file(manifest: dict[str, Any], name: str) -> None:
    files = manifest["segments"][0]["files"]
    files[name] = files.pop("tokens.bin")


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


STORE_DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "missing": (
        lambda d: (d / "segment-00002/lse.idx").unlink(),
        "segment-00002/lse.idx",
        "missing",
    ),
    "cut": (
        lambda d: (d / "segment-00000/rows.bin").write_bytes(b"\0" * 71),
        "segment-00000/rows.bin",
        "71 bytes, expected 72",
    ),
    "stranger": (
        lambda d: (d / "segment-00000/notes.txt").write_text("x"),
        "segment-00000/notes.txt",
        "does not belong",
    ),
    "a shard gone": (
        lambda d: (d / "segment-00001").rename(d / "elsewhere"),
        "segment-00001/tokens.bin",
        "missing",
    ),
    "spec": (
        lambda d: rewrite(d / "spec.json", lambda v: v.update(top_k=4)),
        "spec.json",
        "differs from the spec",
    ),
    "shard's entry": (
        lambda d: rewrite(d / "segment-00001/shard.json", lambda v: v.update(tokens=1)),
        "segment-00001/shard.json",
        "differs from the shard's entry",
    ),
    "manifest's version": (
        lambda d: rewrite(d / "manifest.json", lambda v: v.update(version=4)),
        "manifest.json",
        "version 4, but this nemo-kd reads 1 to 3",
    ),
    "manifest's totals": (
        lambda d: rewrite(d / "manifest.json", lambda v: v["totals"].update(tokens=1)),
        "manifest.json",
        "totals",
    ),
    "manifest's file names": (
        lambda d: rewrite(d / "manifest.json", lambda v: rename_file(v, "../../../secret\0")),
        "manifest.json",
        "segment-00000 has the files",
    ),
    "manifest's text": (
        lambda d: rewrite(d / "manifest.json", lambda v: None),
        "manifest.json",
        "altered",
    ),
    "no JSON": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json", "JSON"),
}


@pytest.mark.parametrize("kind", STORE_DAMAGE)
def test_damage_of_the_store_is_named_by_file(tmp_path: Path, kind: str) -> None:
    damage, file, message = STORE_DAMAGE[kind]
    directory = store(tmp_path / "s", spec())
    opened = Store(directory)
    damage(directory)
    found = [problem for problem in verify(opened) if problem.file == file]
    assert found and any(message in problem.what for problem in found), list(verify(opened))


def test_checksums_alone_find_every_changed_byte_and_no_other_fault(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec())
    assert list(verify(directory, checksums_only=True)) == []
    steps: list[tuple[int, int]] = []
    for name in ("segment-00000/tokens.bin", "segment-00001/lse.idx", "index.bin"):
        path, intact = directory / name, (directory / name).read_bytes()
        path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        found = list(verify(directory, lambda *step: steps.append(step), checksums_only=True))
        assert [problem.file for problem in found if "SHA-256" in problem.what] == [name]
        path.write_bytes(intact)
    assert all(done <= total for done, total in steps) and steps[-1][0] == steps[-1][1]


def test_samples_out_of_order_are_found_though_their_checksums_fit(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec())
    edit(
        directory / "segment-00001" / "rows.bin",
        "<i8",
        lambda values: values.__setitem__(slice(None), np.roll(values, 3)),
    )
    found = [str(problem) for problem in verify(directory)]
    assert any("segment-00001/rows.bin" in line and "out of order" in line for line in found)


def test_a_samples_checksum_is_that_of_its_tokens(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec())
    one = Store(directory)[2]
    row, checksum, sealed = np.fromfile(directory / "segment-00000/rows.bin", "<i8")[6:9].tolist()
    assert row == 2 and checksum == token_checksum(one.input_ids, one.loss_mask)
    halves = (one.topk.logits - one.topk.logsumexp).astype(np.float16).view(np.uint16)
    arrays = [one.topk.ids.astype(np.uint16), halves, one.topk.logsumexp]
    assert sealed == seal(2, word_sums(array.ravel() for array in arrays))
    other = one.input_ids.copy()
    other[0] ^= 1
    assert token_checksum(other, one.loss_mask) != checksum
    edit(directory / "segment-00000/tokens.bin", "<i4", lambda values: values.__ixor__(1))
    with pytest.raises(
        StoreError, match=r"row 2.*tokens.bin or loss_mask.bin has another checksum"
    ):
        Store(directory)[2]
