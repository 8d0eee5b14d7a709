"""Distributed checkpoints against Megatron-core's own, and what a stranger may put into one."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from nemo_kd.checkpoints import CheckpointError
from nemo_kd.checkpoints.distributed import DistributedCheckpoint, Slice, files_of, write
from nemo_kd.checkpoints.source import PICKLED, open_source, unpickles
from tests.attacks.bounds import bounded
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


@pytest.mark.parametrize(("last", "name"), [("10\n", "iter_0000010"), ("release\n", "release")])
def test_the_directory_above_is_the_last_checkpoint_in_it(
    tmp_path: Path, last: str, name: str
) -> None:
    made(tmp_path / name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(last)
    source = open_source(tmp_path)
    assert source.path == tmp_path / name and source.weights is not None


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


def test_members_of_enumerations_may_be_pickled_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_name(self: Any, protocol: int) -> Any:
        return getattr, (type(self), self._name_)

    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    made(tmp_path / "one")
    assert b"getattr" in (tmp_path / "one/.metadata").read_bytes()
    assert torch.equal(opened(tmp_path / "one").read("table"), value(7).bfloat16())


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
    elif kind == "memo":  # an index of the pickle's memo: 16 GB of an array
        (directory / ".metadata").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    elif kind == "overlap":
        moved(directory, offsets=torch.Size([1, 0, 0]))
    else:
        values = {
            "another object": {"no": "tensor"},
            "another type": torch.zeros(SHAPE),
        }
        data = io.BytesIO()
        torch.save(values.get(kind, value(7).bfloat16()), data)
        content = data.getvalue()
        put(directory, "table", squeezed(content) if kind == "compressed" else content)


def put(directory: Path, key: str, content: bytes) -> None:
    """Write other bytes for a tensor, in a file of their own."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == key)
    metadata.storage_data[index] = _StorageInfo("other.distcp", 0, len(content))
    (directory / "other.distcp").write_bytes(content)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def moved(directory: Path, offsets: torch.Size) -> None:
    """Say that layer 0 is where layer 1 is."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.state_dict_metadata["layers.w"].chunks[0].offsets = offsets
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def squeezed(content: bytes) -> bytes:
    """The same zip with compressed members."""
    result = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
    return result.getvalue()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", r"\.metadata: it is damaged"),
        ("noise", r"\.metadata: it is damaged"),
        ("no metadata", "torch_dist: its format is torch_dist|has no .metadata"),
        ("zarr", "its format is zarr"),
        ("no file", "lacks the file __0_0.distcp"),
        ("cut", "lies outside its file"),
        ("another object", "not a tensor of its size"),
        ("another type", "not a tensor of torch.bfloat16"),
        ("compressed", "zip without compression"),
        ("memo", r"\.metadata: it is damaged"),
        ("overlap", "its chunks overlap"),
    ],
)
def test_a_damaged_checkpoint_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spoilt(made(tmp_path / "one"), kind)
    with bounded(), pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "one").read("layers.w" if kind == "overlap" else "table")
    assert not (tmp_path / "evil").exists()


def test_a_nested_reader_leaves_the_outer_ones_classes_registered() -> None:
    """torch's own context would forget them, and a training could not resume."""
    before = set(torch.serialization.get_safe_globals())
    with unpickles():
        with unpickles():
            pass
        assert set(PICKLED) <= set(torch.serialization.get_safe_globals())
    assert set(torch.serialization.get_safe_globals()) == before
