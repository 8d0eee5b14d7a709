"""A Hugging Face teacher where NeMo, Lightning and Megatron are not installed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import ROOT, Script
from tests.processes import run_script
from tests.teacher.conftest import SETTINGS
from tests.teacher.test_generate import generation
from tests.teacher.test_hf import same_files

PATH = os.pathsep.join([str(ROOT / "tests/without_nemo"), os.environ.get("PYTHONPATH", str(ROOT))])


@pytest.fixture(scope="module")
def script() -> Script:
    """`run_script` without NeMo."""

    def run(*arguments: str, **options: object) -> object:
        return run_script(*arguments, **options, PYTHONPATH=PATH)  # type: ignore[arg-type]

    return run  # type: ignore[return-value]


TURNS = [{"from": "User", "value": "hi"}, {"from": "Assistant", "value": "hello"}]


def dump(world: Path, store: Path) -> list[str]:
    return [
        *SETTINGS,
        "teacher.kind=hf",
        f"model.restore_from_path={world}/llama",
        f"data.file_path={world}/train.jsonl",
        f"output_dir={store}",
    ]


def test_nemo_is_not_there(world: Path, script: Script, tmp_path: Path) -> None:
    row = {"system": "s", "mask": "User", "conversations": TURNS}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    own = [f"data.file_path={tmp_path}/rows.jsonl"]
    overrides = [*dump(world, tmp_path / "store"), *own, "data.reader=nemo"]
    done = script("dump_teacher_topk.py", *overrides, fails=True)
    assert "conversations are read by NeMo itself, which is not installed" in done.stderr
    script("dump_teacher_topk.py", *dump(world, tmp_path / "store"), *own)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dump_has_the_bytes_of_one_beside_nemo(
    world: Path, script: Script, tmp_path: Path, processes: int
) -> None:
    store = tmp_path / "store"
    script("dump_teacher_topk.py", *dump(world, store), processes=processes)
    same_files(world / "store", store)


def test_answers_have_the_bytes_of_those_beside_nemo(
    world: Path, script: Script, tmp_path: Path
) -> None:
    settings = generation(world, "typist", tmp_path / "store")
    script("generate_with_teacher.py", *settings, processes=2)
    same_files(world / "answers", tmp_path / "store")


def test_more_devices_need_a_launcher(world: Path, script: Script, tmp_path: Path) -> None:
    overrides = [*dump(world, tmp_path / "store"), "trainer.devices=2"]
    done = script("dump_teacher_topk.py", *overrides, fails=True)
    assert "one process was started: start this kind of teacher with torchrun" in done.stderr
