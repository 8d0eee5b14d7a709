"""Checks of an environment: what a dump and a training run require, and what is optional."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_kd.doctor.containers import CONTAINERS, WITH_SFT_MODEL, of_nemo, series
from nemo_kd.doctor.environment import Environment
from nemo_kd.doctor.probes import NOT_INSTALLED
from nemo_kd.doctor.rooms import nemo_version_fault

CONTAINER = f"nvcr.io/nvidia/nemo:{CONTAINERS[0].tag}"
# Packages whose versions decide, and those that the tests run on.
TESTED = {"nemo_toolkit": ("2.4.1", "2.5.0"), "megatron-core": ("0.13.1", "0.14.0")}
# Relative, of loss and gradient; float32 rounding over 1003 columns is 30 times smaller.
LARGEST_ERROR = 1e-5
# Parts of an import error that mean only a missing GPU driver, as during an image build.
NO_DRIVER = ("libcuda.so", "NVIDIA driver")


@dataclass(frozen=True)
class Check:
    """Result of one check; a stack that fails a required check is unsupported."""

    name: str
    works: bool
    found: str
    remedy: str = ""
    required: bool = True


def checks(environment: Environment) -> Iterator[Check]:
    """Yield the required checks, then the optional ones."""
    yield from loss_checks(environment)
    yield from nemo_checks(environment)
    if environment.on_gpu:
        yield from gpu_checks(environment)
    optional = (
        ("packages of the nemo-kd command", "command line", _install(environment, "typer rich")),
        (
            "nemo-kd executable",
            "nemo-kd",
            f"{_own_install(environment)}; activate the environment",
        ),
        (
            "Hugging Face checkpoints",
            "Hugging Face",
            _install(environment, "transformers safetensors"),
        ),
        ("GGUF checkpoints", "GGUF", _install(environment, "gguf")),
        ("C++ compiler", "C++", "apt-get install g++ (torch.compile on a CPU needs it)"),
    )
    for name, finding, remedy in optional:
        yield tried(name, finding, environment, remedy, required=False)


def _own_install(environment: Environment) -> str:
    """Command that installs nemo-kd, which is on no package index."""
    if environment.container is not None:
        return "pip install --no-deps . msgspec in a checkout of nemo-kd"
    return "pip install '.[nemo]' -c constraints.txt in a checkout of nemo-kd"


def _install(environment: Environment, packages: str = "") -> str:
    """Command that installs `packages`; in NVIDIA's container without their dependencies, so that
    pip replaces nothing there."""
    if environment.container is None:
        return _own_install(environment)
    return f"pip install --no-deps {packages}" if packages else f"use the container {CONTAINER}"


def tried(
    name: str, finding: str, environment: Environment, remedy: str, *, required: bool = True
) -> Check:
    """Convert the finding of a probe to a check: it failed, works, or could not be tried."""
    fault = environment.faults.get(finding, "not tried")
    if fault is None:
        return Check(name, True, "works", required=required)
    if not environment.gpus and any(sign in fault for sign in NO_DRIVER):
        return Check(name, True, f"installed; no GPU driver here: {fault}", required=required)
    return Check(name, False, fault, remedy, required)


def loss_checks(environment: Environment) -> Iterator[Check]:
    """Checks of the loss on each kind of device; on a GPU with the Triton kernels if installed."""
    for device in ["cpu", "cuda"][: 1 + bool(environment.gpus)]:
        name, remedy = f"loss on {device}", loss_remedy(device, environment)
        error, fault = (
            environment.loss_errors.get(device),
            environment.faults.get(f"loss on {device}"),
        )
        if error is None:
            yield Check(name, False, fault or "not tried", remedy)
            continue
        found = f"largest relative error {error:.0e} against the float64 reference"
        yield Check(name, error < LARGEST_ERROR, found, remedy)


def loss_remedy(device: str, environment: Environment) -> str:
    """The remedy for a loss that fails on `device`."""
    if environment.packages["torch"] is None:
        return _install(environment)
    if device == "cpu":
        return "reinstall torch (2.3 or newer)"
    return (
        "check driver and container with nvidia-smi; without triton the loss uses torch's kernels"
    )


def nemo_checks(environment: Environment) -> Iterator[Check]:
    """Checks of NeMo and its scripts, required where NeMo is one that has the model class.

    Elsewhere a student is trained in another room: see `rooms`.
    """
    nemo = environment.packages["nemo_toolkit"]
    container = of_nemo(nemo) if nemo else None
    required = container is not None and container.sft_model
    for name in TESTED:
        yield series_check(name, environment, required=required)
    if required:
        yield tried("NeMo's MegatronGPTSFTModel", "NeMo", environment, _install(environment))
        yield tried(
            "megatron-core's data helper",
            "data helper",
            environment,
            "pip install --force-reinstall --no-deps megatron-core (its wheel has it compiled)",
        )
    hydra = _install(environment, "hydra-core omegaconf")
    yield tried("scripts (Hydra)", "Hydra", environment, hydra, required=required)


def series_check(name: str, environment: Environment, *, required: bool) -> Check:
    """Check of a package's version, and that megatron-core can be imported."""
    found = environment.packages[name]
    fault = nemo_version_fault(environment) if name == "nemo_toolkit" or required else None
    container = next((one for one in WITH_SFT_MODEL if one.nemo == series(found)), None)
    tag = (container or WITH_SFT_MODEL[0]).tag
    remedy = f"use the container nvcr.io/nvidia/nemo:{tag}"
    if environment.container is None:
        remedy += f", or {_own_install(environment)}"
    if found is None:
        return Check(name, False, NOT_INSTALLED, remedy, required)
    if fault is not None:
        return Check(name, False, f"{found}: {fault}", remedy, required)
    if name in environment.faults:  # the import of NeMo is a check of its own
        imported = tried(name, name, environment, remedy, required=required)
        if not imported.works:
            return Check(name, False, f"{found}, but {imported.found}", remedy, required)
    tested = " and ".join(TESTED[name])
    text = found if found in TESTED[name] or not required else f"{found}; tested are {tested}"
    return Check(name, True, text, required=required)


def gpu_checks(environment: Environment) -> Iterator[Check]:
    """Checks of the NVIDIA packages that NeMo uses on a GPU."""
    use_container = f"use the container {CONTAINER}"
    yield tried("TransformerEngine", "TransformerEngine", environment, use_container)
    yield tried("apex", "apex", environment, f"{use_container}: apex on PyPI is another package")
    yield Check("NCCL", environment.nccl is not None, environment.nccl or "none", use_container)
    remedy = (
        "install the triton version that torch requires; without it the loss uses torch's kernels"
    )
    yield tried("Triton kernels of the loss", "Triton", environment, remedy, required=False)
    found = f"{len(environment.gpus)} visible" if environment.gpus else "none visible"
    remedy = "docker run --gpus all, or srun --gpus-per-node; an image build sees no GPU"
    yield Check("GPUs", bool(environment.gpus), found, remedy, required=False)
