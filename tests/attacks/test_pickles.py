"""A pickle in a checkpoint runs no code where this package looks into it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_kd.errors import NemoKDError
from tests.attacks.bounds import bounded
from tests.cli.test_cli import as_json, nemo_kd

CONFIG = "target: x.Model\nnum_layers: 4\nhidden_size: 48\ntokenizer: {library: huggingface}\n"


class Trap:
    """Unpickling it makes the directory `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def archive(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w:") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_inspect_unpickles_nothing_of_a_nemo_file(tmp_path: Path) -> None:
    trap = pickled({"x": Trap(tmp_path / "ran")})
    members = {"model_config.yaml": CONFIG.encode(), "model_weights/common.pt": trap}
    path = archive(tmp_path / "model.nemo", **members)
    value = as_json("inspect", path)
    assert (value["pickles"], value["num_layers"], value["files"]) == (1, 4, 2)
    assert "load only what you trust" in nemo_kd("inspect", path)
    assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(trap), weights_only=False)  # it is a trap
    assert (tmp_path / "ran").exists()


BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(20)
)
ARCHIVES: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({}, "no model_config.yaml"),
    "a large configuration": ({"model_config.yaml": b"x" * (1 << 19)}, "has 524288 bytes"),
    "a list": ({"model_config.yaml": b"[]"}, "not a mapping"),
    "no YAML": ({"model_config.yaml": b"\x01"}, "cannot be read|unacceptable character"),
    "python in YAML": (
        {"model_config.yaml": b"!!python/object/apply:os.mkdir [ran]"},
        "could not determine a constructor",
    ),
    "deep YAML": ({"model_config.yaml": b"[" * 5000}, "recursion"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_nemo_file_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    members, message = ARCHIVES[kind]
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "model.nemo", **members)
    with bounded():
        printed = nemo_kd("inspect", path, fails=True)
    assert any(part in printed for part in message.split("|")), printed
    assert not (tmp_path / "ran").exists()


def test_headers_of_a_tar_are_bounded(tmp_path: Path) -> None:
    for name, content in (("text", b"no tar" * 200), ("empty", b""), ("cut", b"\0" * 100)):
        path = tmp_path / f"{name}.nemo"
        path.write_bytes(content)
        assert "not a .nemo that can be inspected" in nemo_kd("inspect", path, fails=True)
    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, 6 << 30
    path = tmp_path / "sparse.nemo"
    path.write_bytes(member.tobuf())
    os.truncate(path, 7 << 30)  # sparse
    with bounded():
        assert "a header of" in nemo_kd("inspect", path, fails=True)
    path = archive(tmp_path / "aliases.nemo", **{"model_config.yaml": BOMB})
    with bounded():
        assert "files" in nemo_kd("inspect", path)


@pytest.mark.nemo
def test_a_run_s_record_is_read_without_running_code(tmp_path: Path) -> None:
    from nemo_kd.nemo import record

    config = OmegaConf.create({"model": {"layers": [1, 2], "name": "x"}})
    own = {"global_step": 7, "hyper_parameters": config, "loops": {}, "state": torch.ones(3)}
    for path in (tmp_path / "x.ckpt", tmp_path / "directory/common.pt"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickled(own))
        given = path if path.suffix == ".ckpt" else path.parent
        assert record.read(str(given))[0].step == 7
        path.write_bytes(pickled({**own, "x": Trap(tmp_path / "ran")}))
        with pytest.raises(NemoKDError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
            record.read(str(given))
    assert not (tmp_path / "ran").exists()
