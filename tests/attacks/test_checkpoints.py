"""Hostile checkpoints: each is a CheckpointError in one line, in bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from nemo_kd.checkpoints import CheckpointError, open_checkpoint, resolve_tokenizer
from nemo_kd.checkpoints.families import shapes_of
from tests.attacks.bounds import bounded
from tests.checkpoints import models

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory `hf` and the same model as `model.gguf`."""
    directory = tmp_path_factory.mktemp("checkpoint")
    model = models.llama("tied_grouped")
    models.save(model, directory / "hf")
    models.write_gguf(model, directory / "model.gguf")
    return directory


def read_all(path: Path, directory: Path) -> None:
    """Read every tensor and the tokenizer of a checkpoint."""
    checkpoint = open_checkpoint(path)
    for name in shapes_of(checkpoint.model):
        checkpoint.tensor(name)
    checkpoint.save_tokenizer(str(directory / "saved"))


def text(name: str, content: bytes) -> Spoil:
    return lambda directory: (directory / name).write_bytes(content)


def index(content: bytes) -> Spoil:
    """Put an index in place of the weights' single file."""

    def change(directory: Path) -> None:
        (directory / WEIGHTS).rename(directory / "one.safetensors")
        (directory / INDEX).write_bytes(content)

    return change


def setting(**values: Any) -> Spoil:
    """Change keys of config.json; None removes one."""

    def edit(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text()) | values
        kept = {key: value for key, value in config.items() if value is not None}
        (directory / CONFIG).write_text(json.dumps(kept))

    return edit


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS, {"format": "pt"})

    return edit


def norm(value: float | torch.Tensor) -> Spoil:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if isinstance(value, torch.Tensor):
            tensors["model.norm.weight"] = value
        else:
            tensors["model.norm.weight"][3] = value

    return weights(change)


def cut(name: str, size: int) -> Spoil:
    return lambda directory: os.truncate(directory / name, size)


def fifo(name: str) -> Spoil:
    def make(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return make


DIRECTORIES: dict[str, tuple[Spoil, str]] = {
    "config {": (text(CONFIG, b"{"), "config.json"),
    "config []": (text(CONFIG, b"[]"), "Expected `object`"),
    "empty config": (text(CONFIG, b""), "config.json"),
    "deep config": (text(CONFIG, b"[" * 1_000_000), "config.json"),
    "config of 5 MB": (text(CONFIG, b'{"a": "' + b"x" * (5 << 20) + b'"}'), "at most"),
    "config is a FIFO": (fifo(CONFIG), "no config.json"),
    "no hidden_size": (setting(hidden_size=None), "missing required field `hidden_size`"),
    "no layers": (setting(num_hidden_layers=0), "Expected `int` >= 1"),
    "1e9 layers": (setting(num_hidden_layers=1e9), "num_hidden_layers"),
    "10**9 layers": (setting(num_hidden_layers=10**9), "Expected `int` <= 4096"),
    "no heads": (setting(num_attention_heads=0), "num_attention_heads"),
    "heads as text": (setting(num_attention_heads="4"), "num_attention_heads"),
    "a huge vocabulary": (setting(vocab_size=1 << 40), "vocab_size"),
    "NaN as epsilon": (setting(rms_norm_eps=float("nan")), "config.json"),
    "negative epsilon": (setting(rms_norm_eps=-1.0), "rms_norm_eps"),
    "RoPE as a list": (setting(rope_scaling=[1]), "rope_scaling"),
    "RoPE without factors": (
        setting(rope_scaling={"rope_type": "llama3"}),
        "Missing required keys in `rope_scaling`",
    ),
    "an index {": (index(b"{"), INDEX),
    "an index without weight_map": (index(b"{}"), "missing required field `weight_map`"),
    "an index with numbers": (index(b'{"weight_map": {"a": 1}}'), "Expected `str`"),
    "an index to elsewhere": (
        index(b'{"weight_map": {"a": "../hf/model.safetensors"}}'),
        "without a directory",
    ),
    "an absolute index": (index(b'{"weight_map": {"a": "/etc/passwd"}}'), "without a dir"),
    "an index to nothing": (index(b'{"weight_map": {"a": "b"}}'), "1 are missing"),
    "weights cut": (cut(WEIGHTS, 5000), WEIGHTS),
    "weights of 4 bytes": (cut(WEIGHTS, 4), WEIGHTS),
    "no weights": (cut(WEIGHTS, 0), WEIGHTS),
    "a header of 2^62 bytes": (text(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), WEIGHTS),
    "weights are a FIFO": (fifo(WEIGHTS), "has neither model.safetensors nor"),
    "NaN": (norm(float("nan")), "model.norm.weight has values that are NaN"),
    "infinite": (norm(float("inf")), "model.norm.weight has values that are NaN"),
    "int8": (norm(torch.ones(48, dtype=torch.int8)), "model.norm.weight is I8"),
    "tokenizer {": (text("tokenizer.json", b"{"), "no tokenizer"),
    "tokenizer config []": (text("tokenizer_config.json", b"[]"), "no tokenizer"),
    "tokenizer config deep": (text("tokenizer_config.json", b"[" * 100_000), "no tokenizer"),
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_a_hostile_directory_is_one_error(intact: Path, tmp_path: Path, kind: str) -> None:
    spoil, message = DIRECTORIES[kind]
    directory = shutil.copytree(intact / "hf", tmp_path / "hf")
    spoil(directory)
    with bounded(), pytest.raises(CheckpointError) as caught:
        read_all(directory, tmp_path)
    assert message in str(caught.value) and len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def header(*parts: bytes, tensors: int = 0, keys: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def array(kind: int, count: int) -> bytes:
    return key("a", 9, struct.pack("<IQ", kind, count))


HEADERS = {
    "empty": b"",
    "another file": b"nothing of the kind" * 10,
    "cut in its head": header()[:10],
    "version 99": header(version=99),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^63 keys": header(keys=1 << 63),
    "2^63 tensors": header(key("a", 4, b"1234"), tensors=1 << 63),
    "a key of 2^62 bytes": header(struct.pack("<Q", 1 << 62) + b"a"),
    "an array of 2^62 numbers": header(array(0, 1 << 62)),
    "an array of 2^62 texts": header(array(8, 1 << 62)),
    "an array of 2^21 texts, cut": header(array(8, 1 << 21)),
    "an array of arrays": header(array(9, 3) + b"\0" * 100),
    "an unknown type": header(key("a", 99, b"")),
    "four billion dimensions": header(
        struct.pack("<Q", 1) + b"t" + struct.pack("<I", 0xFFFFFFFF), tensors=1, keys=0
    ),
    "no keys": header(keys=0) + b"\0" * 64,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_gguf_header_is_one_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HEADERS[kind])
    message = "architecture is None" if kind == "no keys" else "not a readable GGUF"
    with bounded(), pytest.raises(CheckpointError, match=message) as caught:
        read_all(path, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_gguf_cut_or_corrupted_anywhere_is_an_error_or_a_model(
    intact: Path, tmp_path: Path
) -> None:
    whole = (intact / "model.gguf").read_bytes()
    end = whole.index(b"tokenizer.ggml.merges")  # damage beyond it is of texts and weights
    generator, path = random.Random(0), tmp_path / "model.gguf"
    errors = 0
    for turn in range(150):
        spoiled = bytearray(whole)
        at = generator.randrange(end)
        if turn % 3:
            spoiled[at] = generator.randrange(256)
        else:
            del spoiled[at:]
        path.write_bytes(spoiled)
        try:
            with bounded():
                read_all(path, tmp_path)
        except CheckpointError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors > 50


def test_nan_and_integers_in_a_gguf_are_refused(intact: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = (intact / "model.gguf").read_bytes()
    path.write_bytes(whole[:-16] + struct.pack("<4f", *[float("nan")] * 4))
    with bounded(), pytest.raises(CheckpointError, match="NaN or infinite"):
        read_all(path, tmp_path)
    name = b"output_norm.weight"
    at = whole.index(name) + len(name) + 4 + 8  # dimensions, one of them
    spoiled = bytearray(whole)
    spoiled[at : at + 4] = struct.pack("<I", 26)  # I32
    path.write_bytes(spoiled)
    with bounded(), pytest.raises(CheckpointError, match=r"model.norm.weight is I32"):
        read_all(path, tmp_path)


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ARTIFACTS: dict[str, tuple[bytes, str]] = {
    "no zip": (b"nothing", "not a zip"),
    "a path upwards": (zipped({"../x": b""}), "without directories"),
    "an absolute path": (zipped({"/tmp/x": b""}), "without directories"),
    "a directory": (zipped({"x/": b""}), "without directories"),
    "thousands of files": (zipped({str(i): b"" for i in range(2000)}), "unpacks to 2000 files"),
    "300 MB of zeros": (zipped({"x": bytes(300 << 20)}), "unpacks to 1 files of 314572800"),
}


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_a_hostile_tokenizer_artifact_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data, message = ARTIFACTS[kind]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model.nemo"
    with tarfile.open(model, "w") as archive:
        member = tarfile.TarInfo("./t.zip")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    block = {"library": "huggingface", "type": "/nowhere/t", "model": "nemo:t.zip"}
    with bounded(), pytest.raises(CheckpointError) as caught:
        resolve_tokenizer(OmegaConf.create({"tokenizer": block}), model)
    assert message in str(caught.value)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not left and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["../t.zip", "/etc/passwd", "absent.zip"])
def test_an_artifact_lies_in_the_checkpoint(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model.nemo"
    tarfile.open(model, "w").close()
    (tmp_path / "t.zip").write_bytes(zipped({"a": b""}))
    (tmp_path / "unpacked").mkdir()
    block = {"library": "huggingface", "type": "/nowhere/t", "model": f"nemo:{name}"}
    for checkpoint in (model, tmp_path / "unpacked"):
        with bounded(), pytest.raises(CheckpointError):
            resolve_tokenizer(OmegaConf.create({"tokenizer": block}), checkpoint)


def test_only_the_user_lets_a_tokenizer_run_code(tmp_path: Path) -> None:
    block = {"library": "huggingface", "type": "name/on-a-hub", "trust_remote_code": True}
    config = OmegaConf.create({"tokenizer": block})
    resolve_tokenizer(config, tmp_path)
    assert "trust_remote_code" not in config.tokenizer
