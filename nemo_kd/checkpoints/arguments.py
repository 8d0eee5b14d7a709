"""Megatron-LM's arguments in a distributed checkpoint.

Megatron-LM saves its `argparse.Namespace` as `args` in `common.pt`, with megatron-core 0.19 in a
sharded object. torch.save writes either: a zip with a pickle and the storages of tensors.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping
from typing import Any, ClassVar

from nemo_kd.checkpoints.distributed import COMMON, SafeUnpickler
from nemo_kd.checkpoints.model import CheckpointError, reading
from nemo_kd.checkpoints.source import Source

COMMON_STATE = "common_state/shard_0_1"
"""The sharded object in place of `common.pt`."""
MAX_PICKLE = 64 << 20  # bytes


class _ArgumentsUnpickler(SafeUnpickler):
    """Unpickler that creates plain values and the Namespace alone, and runs no code."""

    NAMES: ClassVar[set[tuple[str, str]]] = {("argparse", "Namespace")}

    def persistent_load(self, pid: Any) -> None:
        """A tensor's storage, of a random state or an optimizer: not needed."""


def read_arguments(source: Source) -> dict[str, Any]:
    """Return Megatron-LM's arguments; an empty dict if the checkpoint has none.

    Values that are not plain, such as enumerations, are left out. Errors: CheckpointError for a
    damaged file.
    """
    extent = source.files.get(COMMON)
    if extent is None and source.weights is not None:
        extent = source.weights.object(COMMON_STATE)
    if extent is None:
        return {}
    name = f"{source.path}: {COMMON}"
    with reading(name), extent.open() as file, zipfile.ZipFile(file) as archive:
        member = next(one for one in archive.infolist() if one.filename.endswith("data.pkl"))
        if member.file_size > MAX_PICKLE:
            raise CheckpointError(f"{name}: its pickle has {member.file_size} bytes")
        with archive.open(member) as pickled:
            common = _ArgumentsUnpickler(pickled).load()
    if isinstance(common, list) and common:  # a sharded object is a list of one
        common = common[0]
    given = common.get("args") if isinstance(common, Mapping) else None
    if not isinstance(given, argparse.Namespace):
        return {}
    return {key: value for key, value in vars(given).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
