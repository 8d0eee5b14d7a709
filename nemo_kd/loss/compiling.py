"""A graph break around functions that `torch.compile` must not trace."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

REASON = (
    "nemo_kd's losses have their own fused passes and gradients, write into their own memory and "
    "check their input on the CPU: they run as they are, between the compiled graphs"
)


def never_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` eagerly inside a compiled caller, forward and backward.

    `torch.compiler.disable` imports torch._dynamo, which takes as long as torch itself. Nothing
    can be compiled before torch._dynamo is imported, so this module does not import it.
    """
    disabled: Callable[P, T] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function, reason=REASON)
        return disabled(*args, **kwargs)

    # torch.compile counts recompilations per code object, so each function gets its own.
    call.__code__ = call.__code__.replace()  # type: ignore[attr-defined]
    return call
