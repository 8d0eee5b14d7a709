"""Tokens that end an answer besides the tokenizer's end of sequence, as the checkpoint has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_kd.files import decode_json, read_bounded

FILE = "generation_config.json"
MAX_BYTES = 1 << 20


def checkpoint_stop_ids(checkpoint: Path) -> tuple[int, ...]:
    """Return `eos_token_id` of a Hugging Face directory's generation_config.json; empty without it.

    transformers ends answers at any of them: chat models have one that ends a turn. A file that
    transformers derived from config.json says nothing of the tokenizer.
    """
    file = checkpoint / FILE
    if not file.is_file():
        return ()
    settings = decode_json(read_bounded(file, MAX_BYTES), dict[str, Any])
    found = None if settings.get("_from_model_config") else settings.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return tuple(each for each in ids if type(each) is int and each >= 0)
