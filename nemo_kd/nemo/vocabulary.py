"""NeMo's SFT model with the right size of the vocabulary where a tokenizer's ids have gaps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_kd.nemo.families import FamilyModel
from nemo_kd.vocabulary import VocabularySize


class WholeTokenizer(AutoTokenizer):
    """NeMo's tokenizer of transformers; its `vocab_size` counts ids, where NeMo counts tokens."""

    @cached_property
    def vocab_size(self) -> int:
        return VocabularySize.of(self.tokenizer).ids

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = True) -> str:
        """Convert ids to text, omitting ids that have no token."""
        known = [i for i, token in zip(ids, self.ids_to_tokens(ids), strict=True) if token]
        return str(super().ids_to_text(known, remove_special_tokens))


class SFTModel(FamilyModel):
    """SFT model whose embedding has a row for every id of its tokenizer.

    Of NeMo's, the embedding and what generation may choose end at the number of tokens.
    """

    def _build_tokenizer(self) -> None:
        super()._build_tokenizer()
        if type(self.tokenizer) is AutoTokenizer:
            self.tokenizer.__class__ = WholeTokenizer  # it has the same state

    def _build_vocab(self) -> None:
        super()._build_vocab()
        rows = self.cfg.get("override_vocab_size")  # NeMo builds the model with it
        if rows is not None:
            self.padded_vocab_size: int = rows
