"""An old model and its tokenizer stay until the new ones are complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nemo_kd.checkpoints import open_checkpoint, write_nemo
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo import cpu
from tests.checkpoints import models
from tests.conftest import ROOT
from tests.store.test_writer import contents


def failing(size: int) -> None:
    raise RuntimeError


def test_a_failed_conversion_changes_nothing(tmp_path: Path) -> None:
    cpu.install()
    source = open_checkpoint(models.save(models.llama("tied_grouped"), tmp_path / "source"))
    output = tmp_path / "out/a.nemo"
    write_nemo(source, output, [0])
    before = contents(tmp_path / "out")
    with pytest.raises(RuntimeError):
        write_nemo(source, output, [1], written=failing)
    assert contents(tmp_path / "out") == before
    write_nemo(source, output, [1])
    after = contents(tmp_path / "out")
    assert after.keys() == before.keys() and after != before
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["a.nemo", "a.tokenizer"]
    (tmp_path / "out/a.tokenizer/mine").write_text("mine")
    with pytest.raises(NemoKDError, match=r"mine was not written with a\.nemo"):
        write_nemo(source, output, [1])
    assert (tmp_path / "out/a.tokenizer/mine").read_text() == "mine"


def test_neither_a_trained_model_nor_another_file_is_replaced(tmp_path: Path) -> None:
    source = open_checkpoint(models.save(models.llama("tied_grouped"), tmp_path / "source"))
    output, config = tmp_path / "a.nemo", tmp_path / "model_config.yaml"
    config.write_text("converted_from: {}\ndata: {train_ds: {}}\n")
    output.write_text("mine")
    for _ in range(2):
        before = output.read_bytes()
        with pytest.raises(NemoKDError, match="is not a model that a conversion wrote"):
            write_nemo(source, output, [0])
        assert output.read_bytes() == before
        with tarfile.open(output, "w:") as archive:
            archive.add(config, arcname="./model_config.yaml")


KILLED = """
import os, signal, sys
from nemo_kd.nemo import cpu
from nemo_kd.checkpoints import open_checkpoint, write_nemo
cpu.install()
kill = lambda size: os.kill(os.getpid(), signal.SIGKILL)
write_nemo(open_checkpoint(sys.argv[1]), sys.argv[2], [1], written=kill)
"""


def test_a_killed_conversion_leaves_the_old_model_and_the_next_one_cleans_up(
    tmp_path: Path,
) -> None:
    cpu.install()
    directory = models.save(models.llama("tied_grouped"), tmp_path / "source")
    output = tmp_path / "out/a.nemo"
    write_nemo(open_checkpoint(directory), output, [0])
    before = contents(tmp_path / "out")
    command = [sys.executable, "-c", KILLED, str(directory), str(output)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    found = contents(tmp_path / "out")
    assert {key: found[key] for key in before} == before and len(found) > len(before)
    write_nemo(open_checkpoint(directory), output, [1])
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["a.nemo", "a.tokenizer"]


def test_a_source_named_like_the_tokenizer_is_not_removed(tmp_path: Path) -> None:
    directory = models.save(models.llama("tied_grouped"), tmp_path / "model.tokenizer")
    before = contents(directory)
    with pytest.raises(NemoKDError, match="is a source"):
        write_nemo(open_checkpoint(directory), tmp_path / "model.nemo", [0])
    assert contents(directory) == before
