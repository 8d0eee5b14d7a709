"""Refuse CUDA graphs of full training iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_kd.errors import NemoKDError

SETTINGS = ("cuda_graph_impl", "cuda_graph_scope", "cuda_graph_modules")
"""Where megatron-core 0.14 to 0.19 have `full_iteration`."""
SWITCHES = ("enable_cuda_graph", "external_cuda_graph")
"""What turns graphs on beside, or before, `cuda_graph_impl`; the scope alone makes none."""
FULL_ITERATION = "full_iteration"


def refuse_full_iteration(config: Any, naming: Callable[[str], str] = str) -> None:
    """Refuse a `TransformerConfig`, or Megatron-LM's arguments, with graphs of full iterations.

    A replay has the batch of the capture: of a micro-batch's teacher rows, number of answer tokens
    and weights, Megatron copies none into the graph's memory. `naming`: how messages name a
    setting. Graphs of single layers are accepted.

    Errors: NemoKDError.
    """
    off = getattr(config, "cuda_graph_impl", "none") == "none" and not any(
        getattr(config, name, False) for name in SWITCHES
    )
    for name in SETTINGS:
        if off and name == "cuda_graph_scope":
            continue
        given = getattr(config, name, None)
        values = given if isinstance(given, list | tuple) else [given]
        words = [word for value in values for word in _name(value).split(",")]
        if FULL_ITERATION in words:
            raise NemoKDError(
                f"{naming(name)}={FULL_ITERATION}: a CUDA graph of a full iteration would replay "
                "the teacher's rows and the number of answer tokens of the captured one; use "
                "graphs of single layers, or none"
            )


def _name(value: Any) -> str:
    """Return the name of a scope: a string, or a member of Megatron-core's enumeration."""
    return str(getattr(value, "name", value))
