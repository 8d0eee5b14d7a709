"""The installed NeMo: which of its features exist, and what to install if an import fails.

NeMo 2.5 needs h5py at import without requiring it, and has no mixin that puts adapters into a
model; NeMo 2.6 and later have no MegatronGPTSFTModel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_kd.errors import NemoKDError

CORES_OF_NEMO_2_4 = [["0", "12"], ["0", "13"]]
ADAPTER_MIXIN = "collections/nlp/parts/mixins/nlp_adapter_mixins.py"


def nemo_version() -> str:
    """Return the version of the installed NeMo; "" if there is none."""
    return _version("nemo_toolkit")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def has_adapters() -> bool:
    """Whether NeMo's SFT model takes adapters; looks for a file, imports nothing."""
    spec = importlib.util.find_spec("nemo")
    roots = (spec.submodule_search_locations if spec else None) or []
    return any((Path(root) / ADAPTER_MIXIN).is_file() for root in roots)


@contextmanager
def imports_of_nemo() -> Iterator[None]:
    """Context in which a module that NeMo's import misses raises an error that says what to do.

    NeMo 2.4 is refused beside megatron-core 0.14 and later, which lack functions that it calls.
    Errors: NemoKDError.
    """
    _refuse_newer_megatron()
    try:
        yield
    except ModuleNotFoundError as error:
        raise NemoKDError(_remedy(error.name or str(error))) from error


def _refuse_newer_megatron() -> None:
    nemo, core = nemo_version(), _version("megatron-core")
    if nemo.startswith("2.4.") and core and core.split(".")[:2] not in CORES_OF_NEMO_2_4:
        raise NemoKDError(
            f"NeMo {nemo} does not work with megatron-core {core}: pip install "
            "megatron-core==0.13.1, or nemo_toolkit==2.5.0 for megatron-core 0.14"
        )


def _remedy(module: str) -> str:
    nemo = f"NeMo {nemo_version()}".strip()
    if module == "nemo":
        return "NeMo is not installed: pip install '.[nemo]' -c constraints.txt in a checkout"
    if module.split(".")[0] == "nemo":
        return (
            f"{nemo} has no {module}: MegatronGPTSFTModel is part of NeMo 2.4 and 2.5 (containers "
            "25.07 and 25.09); with a later container, train with nemo_kd.mcore "
            "(examples/megatron_core/train.py)"
        )
    package = module.split(".")[0]
    package = "megatron-core" if package == "megatron" else package
    return (
        f"{nemo} imports {module}, which is not installed: pip install {package} "
        "(in NVIDIA's container with --no-deps)"
    )
