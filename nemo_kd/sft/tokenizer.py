"""What makes two tokenizers the same for distillation: the whole map from ids to tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over every id's token, in id order, of a NeMo tokenizer.

    Two vocabularies of one size with one token moved differ; where the files lie does not matter.
    """
    digest = hashlib.sha256()
    for token in tokenizer.ids_to_tokens(list(range(tokenizer.vocab_size))):
        digest.update(str(token).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def first_difference(ours: Any, origin: Mapping[str, Any]) -> str:
    """`; the first difference is id 7, 'a' there and 'b' here`: where two tokenizers part.

    `ours` is a NeMo tokenizer, `origin` a store's `spec.tokenizer`. Empty where the store's cannot
    be loaded any more, or is no Hugging Face tokenizer: then only fingerprints can be compared.
    """
    if origin.get("library") != "huggingface" or not Path(str(origin.get("path"))).is_dir():
        return ""  # a path that is gone would be taken for a name on a hub
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    try:
        theirs = AutoTokenizer(origin["path"], use_fast=True)
    except ValueError:
        return ""
    common = range(min(ours.vocab_size, theirs.vocab_size))
    tokens = zip(theirs.ids_to_tokens(list(common)), ours.ids_to_tokens(list(common)), strict=True)
    for i, (there, here) in enumerate(tokens):
        if there != here:
            return f"; the first difference is id {i}, {there!r} there and {here!r} here"
    return (
        f"; {theirs.vocab_size} tokens there, {ours.vocab_size} here, the first {len(common)} equal"
    )
