"""Distributed checkpoints against Megatron-core's own, and what a stranger may put into one."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_kd.checkpoints import CheckpointError
from nemo_kd.checkpoints.distributed import DistributedCheckpoint, Slice, files_of, write
from tests.processes import run_program

LAYERS, SHAPE = 3, (6, 4)


def value(layer: int) -> torch.Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(SHAPE) + 100 * layer


def made(directory: Path) -> Path:
    """Three layers and a tensor outside them, with the object of each layer."""
    slices = [
        Slice("layers.w", SHAPE, torch.float32, partial(value, i), ((i, LAYERS),))
        for i in range(LAYERS)
    ]
    slices.append(Slice("table", SHAPE, torch.bfloat16, lambda: value(7)))
    objects = [("layers._extra_state", ((i, LAYERS),)) for i in range(LAYERS)]
    write(slices, [*objects, ("final._extra_state", ())], directory)
    return directory


def opened(path: Path, folder: str = "") -> DistributedCheckpoint:
    return DistributedCheckpoint(str(path), files_of(path, folder))


def test_a_slice_is_what_was_written(tmp_path: Path) -> None:
    checkpoint = opened(made(tmp_path / "one"))
    assert checkpoint.shapes == {"layers.w": (LAYERS, *SHAPE), "table": SHAPE}
    assert checkpoint.dtype("table") is torch.bfloat16
    for layer in range(LAYERS):
        assert torch.equal(checkpoint.read("layers.w", (layer,)), value(layer))
    assert torch.equal(checkpoint.read("layers.w"), torch.stack([*map(value, range(LAYERS))]))
    assert torch.equal(checkpoint.read("table"), value(7).bfloat16())


def test_a_tar_is_read_in_place(tmp_path: Path) -> None:
    made(tmp_path / "model/model_weights")
    with tarfile.open(tmp_path / "a.nemo", "w:") as archive:
        archive.add(tmp_path / "model", arcname=".")
    checkpoint = opened(tmp_path / "a.nemo", "model_weights")
    assert torch.equal(checkpoint.read("layers.w", (2,)), value(2))


def test_megatron_core_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    """On two processes: rows are split, and a table is padded."""
    made(tmp_path / "ours")
    run_program("tests/checkpoints/megatron_world.py", tmp_path, processes=2, fork=True)
    read: dict[str, Any] = torch.load(tmp_path / "read.pt", weights_only=True)
    assert torch.equal(read["w"], torch.stack([*map(value, range(LAYERS))]))
    assert torch.equal(read["table"][:6], value(7).bfloat16())
    assert read["extra"] is None
    theirs = opened(tmp_path / "theirs")
    for layer in range(LAYERS):
        assert torch.equal(theirs.read("layers.w", (layer,)), value(layer))
    assert torch.equal(theirs.read("table")[:6], value(7).bfloat16())


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def spoilt(directory: Path, kind: str) -> None:
    if kind == "pickle":
        (directory / ".metadata").write_bytes(pickle.dumps(Evil()))
    elif kind == "noise":
        (directory / ".metadata").write_bytes(b"nothing of the kind")
    elif kind == "no metadata":
        (directory / ".metadata").unlink()
    elif kind == "zarr":
        (directory / ".metadata").unlink()
        (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    elif kind == "no file":
        (directory / "__0_0.distcp").unlink()
    elif kind == "cut":
        os.truncate(directory / "__0_0.distcp", 1000)
    else:
        data = io.BytesIO()
        torch.save({"no": "tensor"}, data)
        file = directory / "__0_0.distcp"
        file.write_bytes(data.getvalue().ljust(file.stat().st_size, b"\0"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", r"\.metadata: it is damaged"),
        ("noise", r"\.metadata: it is damaged"),
        ("no metadata", "torch_dist: its format is torch_dist|has no .metadata"),
        ("zarr", "its format is zarr"),
        ("no file", "lacks the file __0_0.distcp"),
        ("cut", "lies outside its file"),
        ("another object", "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spoilt(made(tmp_path / "one"), kind)
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "one").read("table")
    assert not (tmp_path / "evil").exists()
