"""What a `.nemo` contains, for `nemo-kd inspect`: nothing of it is unpickled or unpacked."""

from __future__ import annotations

import tarfile
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

from nemo_kd.errors import NemoKDError
from nemo_kd.files import open_regular

CONFIG = "model_config.yaml"
PICKLES = (".pt", ".ckpt", ".bin", ".pkl", ".distcp", ".metadata")
"""Endings of the files that loading a `.nemo` unpickles."""
SHOWN = (
    *("target", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    *("num_query_groups", "max_position_embeddings", "precision"),
)
MAX_MEMBERS, MAX_CONFIG, MAX_READ = 1 << 16, 1 << 18, 1 << 20


def inspect_archive(path: Path) -> dict[str, Any]:
    """Return sizes, selected settings and the names of pickles of a `.nemo` file.

    Reads the tar's headers and the text of its configuration; raises NemoKDError if damaged.
    """
    try:
        with open_regular(path) as file:
            small_reads: Any = _Bounded(file)
            tar = tarfile.open(fileobj=small_reads, mode="r:")  # noqa: SIM115 (closed with `file`)
            files = [member for member in _members(tar) if member.isfile()]
            config = _config(tar, files)
    except (OSError, tarfile.TarError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise NemoKDError(f"{path}: not a .nemo that can be inspected ({error})") from error
    pickles = [member.name for member in files if member.name.endswith(PICKLES)]
    tokenizer = config.get("tokenizer")
    return {
        "files": len(files),
        "bytes": sum(member.size for member in files),
        **{name: config[name] for name in SHOWN if _is_scalar(config.get(name))},
        **{f"tokenizer.{k}": v for k, v in _scalars(tokenizer).items()},
        "pickles": len(pickles),
    }


class _Bounded:
    """A file whose reads are small: a tar's header may state any size."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise OSError(f"a header of {size} bytes")
        return self._file.read(size)


def _members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    found = []
    for member in tar:
        found.append(member)
        if len(found) > MAX_MEMBERS:
            raise ValueError(f"more than {MAX_MEMBERS} members")
    return found


def _config(tar: tarfile.TarFile, files: list[tarfile.TarInfo]) -> dict[str, Any]:
    member = next((m for m in files if Path(m.name).name == CONFIG), None)
    if member is None:
        raise ValueError(f"no {CONFIG}")
    if member.size > MAX_CONFIG:
        raise ValueError(f"{CONFIG} has {member.size} bytes")
    file = tar.extractfile(member)
    config = yaml.safe_load(file.read(MAX_CONFIG)) if file is not None else None
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} is not a mapping")
    return config


def _scalars(value: Any) -> dict[str, Any]:
    """Return the entries of a mapping that are texts or numbers; YAML's aliases may be endless."""
    return {str(k): v for k, v in value.items() if _is_scalar(v)} if isinstance(value, dict) else {}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)
