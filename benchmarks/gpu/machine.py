"""The GPU and the versions of what is installed, found in a process that ends before the others.

A GPU may be set to serve one process at a time.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Row

PACKAGES = (
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "liger-kernel",
    "nemo-toolkit",
)


def rows(sizes: Sizes) -> Iterator[Row]:
    row: Row = {"GPU": "none"}
    if sizes.device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        row = {"GPU": properties.name, "GB": round(properties.total_memory / 1e9)}
    yield {
        **row,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        **{name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
