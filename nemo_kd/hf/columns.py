"""Refuse a student with fewer logits than the stores' tokenizer has ids, warn of many more."""

from __future__ import annotations

import warnings
from typing import Any

from nemo_kd.errors import NemoKDError

MULTIPLE = 128
"""Megatron's default for `make_vocab_size_divisible_by`."""
MOST_PADDING = 2048
"""Models of about 200 000 ids have up to 1100 columns that no token uses."""


def columns_of(model: Any) -> int | None:
    """Return the number of a model's logits by its configuration; None if it has none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def refuse_fewer_columns(model: Any, ids: int) -> None:
    """Raise NemoKDError for a model without an embedding for some of the `ids` of the stores."""
    columns = columns_of(model)
    if columns is not None and columns < ids:
        raise NemoKDError(
            f"the model has {columns} logits, but the stores' tokenizer {ids} ids: the student "
            "needs the teacher's tokenizer (model.resize_token_embeddings adds rows for its added "
            "tokens)"
        )


def warn_of_columns(model: Any, ids: int) -> None:
    """Warn if the model has more columns than plausible padding beyond the `ids` of the stores.

    For a student whose tokenizer was not compared, as it always is in NeMo and Megatron. Columns
    beyond the stores' ids do not count, so that a student of another vocabulary would be trained.
    """
    columns = columns_of(model)
    if columns is None or columns - ids <= max(MULTIPLE, min(MOST_PADDING, ids // 16)):
        return
    warnings.warn(
        f"the model has {columns} logits, and the stores' tokenizer only {ids} ids: is it the "
        "student's? Give the student's to StoreDataset (tokenizer=) or to the trainer "
        "(processing_class=), which compare it",
        stacklevel=5,
    )
