"""The facts: versions from package metadata, and what torch says of CUDA, GPUs and NCCL."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    "torch",
    "nemo_toolkit",
    "megatron-core",
    "transformer-engine",
    "apex",
    "triton",
)


@dataclass(frozen=True)
class Environment:
    """Facts, no judgement. A package that is not installed has None for its version."""

    container: str | None
    """What NVIDIA's image says it is; None outside of one."""
    python: str
    packages: dict[str, str | None]
    cuda: str | None = None
    """The CUDA that torch was built with; None: a torch for CPUs."""
    gpus: list[str] = field(default_factory=list)
    nccl: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether NeMo is to run on GPUs here: an image of NVIDIA's is built where none is."""
        return bool(self.gpus) or (self.container is not None and self.cuda is not None)


def look() -> Environment:
    packages = {name: installed(name) for name in PACKAGES}
    base = Environment(container(), platform.python_version(), packages)
    if not importable("torch"):
        return base
    try:
        import torch
    except (ImportError, OSError):  # a library that torch was linked with is missing
        return base
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    with_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return Environment(
        base.container,
        base.python,
        packages,
        torch.version.cuda,
        [
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
            for gpu in gpus
        ],
        ".".join(map(str, torch.cuda.nccl.version())) if with_nccl else None,
    )


def container() -> str | None:
    """NVIDIA's images say in the environment what they are."""
    names = ("NVIDIA_PRODUCT_NAME", "NVIDIA_PYTORCH_VERSION", "NVIDIA_BUILD_ID")
    said = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    return ", ".join(said) or None


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether there is such a top-level module; nothing is imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def package_directory(package: str) -> Path | None:
    spec = find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None
