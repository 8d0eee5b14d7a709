"""The learned positions of a student, which limit its samples; without NeMo."""

from __future__ import annotations

from typing import Any


def max_positions(cfg: Any) -> int | None:
    """Return the number of learned positions of the model `cfg`; None if it learns none."""
    learned = cfg.get("position_embedding_type") in (None, "learned_absolute")
    return cfg.get("max_position_embeddings") if learned else None
