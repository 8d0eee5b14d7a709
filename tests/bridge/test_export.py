"""An export replaces what an export wrote, and only once it is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kd.bridge.export import MARK, new_export
from nemo_kd.errors import NemoKDError


def exported(output: Path, name: str, student: Path) -> None:
    with new_export(output, student, student.parent / "checkpoints") as new:
        (new / name).write_text("weights")


@pytest.fixture
def student(tmp_path: Path) -> Path:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text("{}")
    return tmp_path / "student"


def test_a_second_export_replaces_the_first(student: Path, tmp_path: Path) -> None:
    exported(tmp_path / "out", "adapter_config.json", student)
    exported(tmp_path / "out", "model.safetensors", student)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", MARK}


def test_a_failed_export_leaves_the_first(student: Path, tmp_path: Path) -> None:
    exported(tmp_path / "out", "model.safetensors", student)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        new_export(tmp_path / "out", student, tmp_path / "checkpoints") as new,
    ):
        (new / "half").touch()
        raise RuntimeError("in the middle")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", MARK}
    assert not list(tmp_path.glob(".out*"))


def test_inputs_and_foreign_directories_are_kept(student: Path, tmp_path: Path) -> None:
    with pytest.raises(NemoKDError, match="is a source and would be overwritten"):
        exported(student, "model.safetensors", student)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(NemoKDError, match="no export wrote it"):
        exported(tmp_path / "mine", "model.safetensors", student)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
