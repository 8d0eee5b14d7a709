"""Load a tokenizer of transformers from local files, of any version of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_kd.files import decode_json, read_bounded

MAX_CONFIG = 16 << 20  # bytes of tokenizer_config.json
ANY_FAST = "TokenizersBackend"
"""What transformers 5 calls a tokenizer that is its tokenizer.json, without a class of a model."""


def load_files(path: str | Path, *, use_fast: bool = True) -> Any:
    """Load the tokenizer in the directory `path`; nothing is downloaded, and no code beside it run.

    transformers 5 writes `extra_special_tokens` as a list, which is `additional_special_tokens` in
    transformers 4. Errors: those of transformers, of any type.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = Path(path) / "tokenizer_config.json"
    config: dict[str, Any] = {}
    if file.is_file():
        config = decode_json(read_bounded(file, MAX_CONFIG), dict[str, Any])
    changes: dict[str, Any] = {}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        given = config.get("additional_special_tokens") or []
        changes = {"extra_special_tokens": {}, "additional_special_tokens": [*given, *extra]}
    kind: Any = AutoTokenizer
    if config.get("tokenizer_class") == ANY_FAST and use_fast:
        kind, changes["tokenizer_class"] = PreTrainedTokenizerFast, PreTrainedTokenizerFast.__name__
    return kind.from_pretrained(
        str(path), use_fast=use_fast, local_files_only=True, trust_remote_code=False, **changes
    )
