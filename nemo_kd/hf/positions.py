"""How many tokens a model with an embedding per position can read."""

from __future__ import annotations

from typing import Any

import torch

OFFSET = 2
"""Rows that such an embedding may have before its first position, as in OPT."""


def learned_positions(model: Any) -> int | None:
    """Return the positions of a model that has an embedding for each; None for rotary and others.

    It is found by its size, since models name it differently.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    vocabulary = set(model.get_input_embeddings().modules())
    tables = (
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module not in vocabulary
    )
    found = any(0 <= table.num_embeddings - positions <= OFFSET for table in tables)
    return int(positions) if found else None
