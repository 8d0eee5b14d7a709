"""Facts about an environment: versions from package metadata, and the results of probes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nemo_kd.doctor import probes

PACKAGES = (
    "torch",
    "nemo_toolkit",
    "megatron-core",
    "megatron-bridge",
    "transformer-engine",
    "apex",
    "triton",
)
# Finding → modules imported for it. `amp_C` is a compiled extension that tells NVIDIA's apex from
# the unrelated PyPI package of that name.
IMPORTS = {
    "megatron-core": ("megatron.core",),
    "data helper": ("megatron.core.datasets.helpers_cpp",),
    "TransformerEngine": ("transformer_engine.pytorch",),
    "apex": ("apex", "amp_C"),
    "Triton": ("triton", "triton.language"),
    "Hydra": ("hydra", "omegaconf"),
    "command line": ("typer", "rich"),
    "Hugging Face": ("transformers.models.auto", "safetensors.torch"),
    "GGUF": ("gguf",),
}
ROOMS: Mapping[str, Callable[[], str | None]] = {
    "room store": partial(probes.import_fault, "nemo_kd.store", "nemo_kd.data", "nemo_kd.loss"),
    "room hf": partial(probes.import_fault, "nemo_kd.hf", "nemo_kd.hf.teacher"),
    "room served": partial(probes.import_fault, "nemo_kd.served", "nemo_kd.served.teacher"),
    "room mcore": partial(probes.room_fault, "mcore.cpu.install", "nemo_kd.mcore.training"),
    "room bridge": partial(
        probes.room_fault, "bridge.cpu.install", "megatron.bridge", "nemo_kd.bridge.training"
    ),
    "room megatron_lm": partial(
        probes.room_fault, "mcore.cpu.install_megatron_lm", "nemo_kd.mcore.megatron_lm"
    ),
}
"""Finding of a room → how it is tried; the room `nemo` is the probe "NeMo"."""
PROBES: Mapping[str, Callable[[], str | None]] = {
    **ROOMS,
    "NeMo": probes.nemo_fault,
    "C++": probes.compiler_fault,
    "nemo-kd": probes.program_fault,
    **{name: partial(probes.import_fault, *modules) for name, modules in IMPORTS.items()},
}


@dataclass(frozen=True)
class Environment:
    """Facts without judgement. The version of a package that is not installed is None."""

    container: str | None
    """Name and build of NVIDIA's container image; None outside one."""
    python: str
    packages: dict[str, str | None]
    cuda: str | None = None
    """CUDA version that torch was built with; None for a CPU build."""
    gpus: list[str] = field(default_factory=list)
    nccl: str | None = None
    faults: dict[str, str | None] = field(default_factory=dict)
    """Finding → why it does not work, None if it works; absent if it was not probed."""
    loss_errors: dict[str, float] = field(default_factory=dict)
    """Device → largest relative error of the loss against the float64 reference."""

    @property
    def on_gpu(self) -> bool:
        """Whether NeMo is meant to run on GPUs; NVIDIA's images are often built without one."""
        return bool(self.gpus) or (self.container is not None and self.cuda is not None)


def look() -> Environment:
    """Run all probes, one per core at a time; takes about as long as importing NeMo."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        torch = pool.submit(_try_torch, "cpu")
        waiting = {name: pool.submit(probe) for name, probe in PROBES.items()}
        said, torch_fault = torch.result()
        faults = {name: fault.result() for name, fault in waiting.items()}
    faults["loss on cpu"] = torch_fault
    errors = {"cpu": said.pop("loss_error")} if "loss_error" in said else {}
    if said.get("gpus"):  # last, because the GPU's memory may be full
        on_gpu, faults["loss on cuda"] = _try_torch("cuda")
        errors |= {"cuda": on_gpu["loss_error"]} if "loss_error" in on_gpu else {}
    versions = {name: installed(name) for name in PACKAGES}
    return Environment(
        container(),
        platform.python_version(),
        versions,
        **said,
        faults=faults,
        loss_errors=errors,
    )


def _try_torch(device: str) -> tuple[dict[str, Any], str | None]:
    """Return the findings of `torch_probe`, and why some are missing (None: none are)."""
    if not probes.installed("torch"):
        return {}, f"torch is {probes.NOT_INSTALLED}"
    code = f"from nemo_kd.doctor.torch_probe import main; main({device!r})"
    outcome = probes.python(code)
    said: dict[str, Any] = {}
    for line in outcome.output.splitlines():
        if line.startswith("{"):
            said.update(json.loads(line))
    return said, outcome.fault


def container() -> str | None:
    """Name and build of NVIDIA's image, from its environment variables; None outside one.

    NVIDIA_PYTORCH_VERSION cannot be used: `nemo_kd.nemo.cpu` sets it as well, for NeMo.
    """
    names = ("NVIDIA_PRODUCT_NAME", "NVIDIA_BUILD_ID")
    said = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    return ", ".join(said) or None


def installed(name: str) -> str | None:
    """Version of a package from its metadata; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
