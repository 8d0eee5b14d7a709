"""Rotary embeddings whose frequencies depend on the longest row of a batch, in transformers 4.51.

longrope   other factors above `original_max_position_embeddings` positions
dynamic    another base for each number of positions above `max_position_embeddings`, kept until a
           longer batch, or one below that number
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LengthDependentRope:
    """Which lengths share frequencies, and how to forget those of an earlier batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config.get_text_config()
        scaling = getattr(config, "rope_scaling", None) or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        self.dynamic, self.factor = "dynamic" in kind, scaling.get("factor", 1.0)
        self.limit: int | None = None
        if self.dynamic:
            self.limit = config.max_position_embeddings
        elif kind in ("longrope", "su"):
            own = getattr(config, "original_max_position_embeddings", None)
            inner = scaling.get("original_max_position_embeddings")
            self.limit = own or inner or config.max_position_embeddings
        self.modules: list[Any] = [
            module
            for module in model.modules()
            if self.dynamic and hasattr(module, "max_seq_len_cached")
        ]

    def regime(self, positions: int) -> int:
        """Return a number that is equal for numbers of positions with the same frequencies."""
        if self.limit is None or positions <= self.limit:
            return 0
        return positions if self.dynamic else 1

    @property
    def reach(self) -> float:
        """How many times `max_position_embeddings` a dynamic model computes; 1 for others."""
        return float(self.factor) if self.dynamic else 1.0

    def reset(self) -> None:
        """Restore the state of a model that has seen no batch."""
        for module in self.modules:
            frequencies = module.original_inv_freq.to(module.inv_freq.device)
            module.register_buffer("inv_freq", frequencies, persistent=False)
            module.max_seq_len_cached = module.original_max_seq_len
