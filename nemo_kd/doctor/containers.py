"""NVIDIA's NeMo containers, and the versions of NeMo, Megatron-core and Megatron-Bridge in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Container:
    """Versions are `major.minor` prefixes; None: the package is not in the container."""

    tag: str
    """Tag of `nvcr.io/nvidia/nemo`."""
    nemo: str | None
    core: str
    bridge: str | None
    sft_model: bool = False
    """Whether NeMo has `MegatronGPTSFTModel`, the base class of the `nemo` room's model."""
    adapters: bool = False
    """Whether that class supports adapters, such as LoRA."""

    @property
    def rooms(self) -> tuple[str, ...]:
        """Rooms of nemo_kd in which Megatron's models are trained; Bridge's from NeMo 2.6 on."""
        return "nemo" if self.sft_model else "bridge", "mcore", "megatron_lm"


# From NVIDIA's release notes of the NeMo Framework containers.
CONTAINERS = (
    Container("25.07", "2.4", "0.13", None, sft_model=True, adapters=True),
    Container("25.09", "2.5", "0.14", "0.1", sft_model=True),
    Container("25.11", "2.6", "0.15", "0.2"),
    Container("26.02", "2.7", "0.16", "0.3"),
    Container("26.04", None, "0.17", "0.4"),
    Container("26.06", None, "0.18", "0.5"),
    Container("26.08", None, "0.19", "0.6"),
)
WITH_SFT_MODEL = tuple(one for one in CONTAINERS if one.sft_model)


def series(version: str | None) -> str | None:
    """Return `major.minor` of a version; None for None."""
    return None if version is None else ".".join(version.split(".")[:2])


def like(nemo: str | None, core: str | None) -> Container | None:
    """Return the container with these versions of NeMo and Megatron-core, if there is one."""
    wanted = series(nemo), series(core)
    return next((one for one in CONTAINERS if (one.nemo, one.core) == wanted), None)


def of_nemo(nemo: str) -> Container | None:
    """Return the container with this version of NeMo, if there is one."""
    return next((one for one in CONTAINERS if one.nemo == series(nemo)), None)
