"""The judgements: what a dump and a training run need, and what is good to have."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_kd.doctor.environment import Environment, importable, installed, package_directory

CONTAINER = "nvcr.io/nvidia/nemo:25.07"
# Series that the product is made for, as prefixes; the versions that its tests run on.
SERIES = {"nemo_toolkit": ("2.4.", "2.4.1"), "megatron-core": ("0.13.", "0.13.1")}
# The `apex` on PyPI is not NVIDIA's, which is known by its compiled extension.
APEX_EXTENSION = "amp_C"
SFT_MODEL = "collections/nlp/models/language_modeling/megatron_gpt_sft_model.py"
HELPERS = "collections/nlp/data/language_modeling/megatron"
# Of the loss and its gradient: float32's rounding over 1003 columns is 30 times less.
LARGEST_ERROR = 1e-5


@dataclass(frozen=True)
class Check:
    """One thing that works or not; without a required one the stack is not supported."""

    name: str
    works: bool
    found: str
    remedy: str = ""
    required: bool = True


def checks(environment: Environment) -> Iterator[Check]:
    """What a dump and a training run need, then what is good to have."""
    packages = environment.packages
    yield from loss_checks(environment)
    for name in SERIES:
        yield series_check(name, packages[name])
    if packages["nemo_toolkit"] is not None:
        yield sft_model_check()
        yield helpers_check()
    if environment.on_gpu:
        yield from gpu_checks(environment)
    yield modules_check("scripts (Hydra)", ("hydra", "omegaconf"), "hydra-core omegaconf", True)
    yield modules_check("nemo-kd on the command line", ("typer", "rich"), "typer rich")
    hugging_face = ("transformers", "safetensors")
    yield modules_check("checkpoints of Hugging Face", hugging_face, " ".join(hugging_face))
    yield modules_check("GGUF checkpoints", ("gguf",), "gguf")


def loss_checks(environment: Environment) -> Iterator[Check]:
    """The loss itself, run on each kind of device; on a GPU by the Triton kernels if they are."""
    if not importable("torch"):
        yield Check("loss", False, "torch is not installed", "pip install torch")
        return
    for device in ["cpu", "cuda"][: 1 + bool(environment.gpus)]:
        try:
            error = loss_error(device)
        except Exception as failure:  # whatever a broken torch, driver or Triton raises
            first = (str(failure).strip() or repr(failure)).splitlines()[0]
            yield Check(f"loss on {device}", False, first, loss_remedy(device))
            continue
        found = f"largest relative error {error:.0e} against the float64 reference"
        yield Check(f"loss on {device}", error < LARGEST_ERROR, found, loss_remedy(device))


def loss_remedy(device: str) -> str:
    if device == "cpu":
        return "this torch does not work; install another (2.3 or newer)"
    return (
        "check driver and container with nvidia-smi; without the package triton torch's kernels run"
    )


def loss_error(device: str) -> float:
    """Of Σ loss and its gradient at K = 20, V = 1003: largest difference over largest value."""
    import torch

    from nemo_kd.loss import KDConfig, reference, sft_kd_loss, vocab_parallel_topk

    generator = torch.Generator().manual_seed(0)
    z, t = (4 * torch.randn(2, 64, 1003, generator=generator)).to(device)
    labels = torch.randint(1003, (64,), generator=generator).to(device)
    config = KDConfig(alpha=0.5)
    ours, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = sft_kd_loss(ours, labels, vocab_parallel_topk(t, 20), config).loss
    expected = reference.sft_kd_loss(exact, labels, reference.topk(t, 20), config)[0]
    loss.sum().backward()
    expected.sum().backward()
    pairs = ((loss.detach(), expected.detach()), (ours.grad, exact.grad))
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def series_check(name: str, found: str | None) -> Check:
    prefix, tested = SERIES[name]
    remedy = f'use the container {CONTAINER}, or pip install "nemo-kd[nemo]"'
    if found is None:
        return Check(name, False, "not installed", remedy)
    if not found.startswith(prefix):
        return Check(name, False, f"{found}; supported are {prefix}x", remedy)
    return Check(name, True, found if found == tested else f"{found}; tested is {tested}")


def sft_model_check() -> Check:
    """By its file: that NeMo's package has a version does not say that it can be imported."""
    name, root = "NeMo's MegatronGPTSFTModel", package_directory("nemo")
    if root is not None and (root / SFT_MODEL).is_file():
        return Check(name, True, "there")
    return Check(name, False, f"no {SFT_MODEL}", f"use NeMo {SERIES['nemo_toolkit'][1]}")


def helpers_check() -> Check:
    """NeMo compiles a small C++ helper at the first start, unless it is there."""
    name, root = "NeMo's data helper", package_directory("nemo")
    if root is not None and any((root / HELPERS).glob("helpers*.so")):
        return Check(name, True, "compiled")
    missing = [tool for tool in ("make", "g++", "python3") if shutil.which(tool) is None]
    missing += [] if importable("pybind11") else ["pybind11"]
    if missing:
        found = f"not compiled yet, and {', '.join(missing)} not found"
        return Check(name, False, found, "install make, g++ and pybind11 (apt-get, pip)")
    return Check(name, True, "compiled at the first start")


def gpu_checks(environment: Environment) -> Iterator[Check]:
    """What NeMo takes from NVIDIA's own packages on a GPU."""
    use_container = f"use the container {CONTAINER}"
    te, triton = environment.packages["transformer-engine"], environment.packages["triton"]
    yield Check("TransformerEngine", te is not None, te or "not installed", use_container)
    yield apex_check()
    yield Check("NCCL", environment.nccl is not None, environment.nccl or "none", use_container)
    found = triton or "not installed: the loss runs on torch's kernels"
    remedy = "install the triton that fits torch"
    yield Check("Triton kernels of the loss", triton is not None, found, remedy, required=False)
    found = f"{len(environment.gpus)} visible" if environment.gpus else "none visible"
    remedy = "docker run --gpus all; srun --gpus-per-node; while an image is built there are none"
    yield Check("GPUs", bool(environment.gpus), found, remedy, required=False)


def apex_check() -> Check:
    name, remedy = "apex", f"use the container {CONTAINER}: apex on PyPI is another package"
    if not importable("apex"):
        return Check(name, False, "not installed", remedy)
    if not importable(APEX_EXTENSION):
        return Check(name, False, f"without its extension {APEX_EXTENSION}", remedy)
    return Check(name, True, installed("apex") or "there")


def modules_check(name: str, modules: tuple[str, ...], pip: str, required: bool = False) -> Check:
    missing = [module for module in modules if not importable(module)]
    if missing:
        remedy = f"pip install --no-deps {pip}"
        return Check(name, False, f"{', '.join(missing)} not installed", remedy, required)
    return Check(name, True, "there", required=required)
