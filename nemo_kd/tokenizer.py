"""What makes two tokenizers the same for distillation: the whole map from ids to tokens."""

from __future__ import annotations

import hashlib
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over every id's token, in id order, of a NeMo tokenizer.

    Two vocabularies of one size with one token moved differ; where the files lie does not matter.
    """
    digest = hashlib.sha256()
    for token in tokenizer.ids_to_tokens(list(range(tokenizer.vocab_size))):
        digest.update(str(token).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
