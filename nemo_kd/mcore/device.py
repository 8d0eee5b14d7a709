"""Copies of tensors to this process's device for which the host does not wait."""

from __future__ import annotations

from typing import Any

import torch


def pinned(value: Any) -> Any:
    """Move a tensor, or an object with such a method, to pinned memory; return others unchanged.

    From pageable memory a copy to a GPU waits until the GPU has executed everything before it.
    """
    if hasattr(value, "pin_memory") and torch.cuda.is_available():
        return value.pin_memory()
    return value


def on_device(value: Any) -> Any:
    """Copy a tensor, or an object with such a method, to the device; return others unchanged."""
    if hasattr(value, "to"):
        return value.to(torch.cuda.current_device(), non_blocking=True)
    return value
