"""The size of a vocabulary: ids may have gaps, so that it is not the number of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple


class VocabularySize(NamedTuple):
    """Sizes of a vocabulary."""

    ids: int
    """The largest id plus 1: rows of an embedding that has all tokens, and `vocab_size`."""

    tokens: int
    """The number of tokens; less than `ids` if ids have gaps."""

    @classmethod
    def of(cls, tokenizer: Any) -> VocabularySize:
        """Return the sizes of a tokenizer of transformers, with its added tokens."""
        ids = set(tokenizer.get_vocab().values())
        return cls(max(ids, default=-1) + 1, len(ids))
