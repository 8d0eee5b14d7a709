"""The program of docs/megatron.md: a mix of stores and SFT files, their validation, and LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.bridge import page
from tests.bridge.conftest import Bridge
from tests.bridge.trainings import evaluations, steps
from tests.conftest import ROOT
from tests.distribution.blocks import blocks_of

pytestmark = pytest.mark.slow  # an environment of its own, and 20 seconds to import Bridge


def test_the_program_of_the_page_trains(bridge: Bridge, data: Path, tmp_path: Path) -> None:
    (program,) = [
        block.text
        for block in blocks_of(ROOT / "docs/megatron.md")
        if "from nemo_kd.bridge import" in block.text
    ]
    (tmp_path / "program.py").write_text(program)
    for name, source in {"student": "student", "store": "train", "heldout": "held"}.items():
        shutil.copytree(data / source, tmp_path / name)
    for name in ("rows.jsonl", "valid.jsonl"):
        shutil.copy(data / "rows.jsonl", tmp_path / name)
    done = bridge(ROOT / "tests/bridge/page.py", tmp_path / "program.py", cwd=tmp_path)
    assert len(steps(done.stdout)) == page.STEPS
    assert evaluations(done.stdout)[-1]["sft_loss"] > 0
    assert "rows.jsonl: its rows are read as" not in done.stdout + done.stderr
    assert (tmp_path / "run/checkpoints/pretrained").is_dir()
