"""A published file is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from nemo_kd import files
from nemo_kd.files import (
    commit,
    open_regular,
    publish,
    published,
    read_bounded,
    sha256_of,
)
from nemo_kd.spelling import did_you_mean, nearest


def test_a_file_is_replaced_at_a_clean_exit_only(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    publish(path, "old")
    with pytest.raises(RuntimeError), published(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with published(path) as temporary:
        temporary.write_bytes(b"\0\1")
        assert path.read_text() == "old"
    assert path.read_bytes() == b"\0\1"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_temporary_file_is_new_whatever_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".x.guessed.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        publish(tmp_path / "x", "text")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / ".x.guessed.tmp").is_symlink()


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("fifo", "zero", "."):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(tmp_path / name)
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("x")
    assert read_bounded(tmp_path / "link", 3) == b"abc"
    with pytest.raises(OSError, match="3 bytes where at most 2 are read"):
        read_bounded(tmp_path / "x", 2)


def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    publish(tmp_path / "x", "text")
    (tmp_path / "y").write_text("text")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file, and of a directory with the files in it."""
    synced: list[str] = []
    monkeypatch.setattr(files, "fsync", lambda path: synced.append(path.name))
    renamed = os.replace

    def replace(source: Path, target: Path) -> None:
        synced.append("rename")
        renamed(source, target)

    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new/a").write_text("a")
    commit(tmp_path / ".new", tmp_path / "directory")
    assert synced == ["a", ".new", "rename", tmp_path.name]
    synced.clear()
    publish(tmp_path / "file", "text")
    assert [name.startswith(".file.") for name in synced] == [True, False, False]
    assert synced[1:] == ["rename", tmp_path.name]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


def test_the_nearest_name() -> None:
    assert nearest("temprature", ["top_k", "temperature"]) == "temperature"
    assert nearest("seed", ["top_k", "temperature"]) is None
    assert did_you_mean("topk", ["top_k"], prefix="dump.") == "; did you mean dump.top_k?"
    assert did_you_mean("seed", ["top_k"]) == ""
