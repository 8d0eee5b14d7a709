"""Tokenizers for the eye: ids to text, from what a store's manifest says or from a path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nemo_kd.store.errors import StoreError
from nemo_kd.store.spec import StoreSpec


class Tokenizer(Protocol):
    """The two things of a NeMo tokenizer that its fingerprint needs, and text."""

    vocab_size: int

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...

    def text(self, ids: Sequence[int]) -> str: ...


class HuggingFaceTokenizer:
    library = "huggingface"

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self.vocab_size = len(self._tokenizer)

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        tokens: list[str] = self._tokenizer.convert_ids_to_tokens(list(ids))
        return tokens

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


class SentencePieceTokenizer:
    library = "sentencepiece"

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=path)
        self.vocab_size = int(self._processor.get_piece_size())

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(self._processor.id_to_piece(int(i))) for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.ids_to_tokens(ids)).replace("▁", " ")


class Ids:
    """Ids themselves, as `⟨17⟩`: needs no tokenizer."""

    vocab_size = 0

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [f"⟨{i}⟩" for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.ids_to_tokens(ids))


LOADERS: dict[str, Any] = {
    loader.library: loader for loader in (HuggingFaceTokenizer, SentencePieceTokenizer)
}


def load_tokenizer(path: str, library: str | None = None) -> Tokenizer:
    """A SentencePiece `.model` file, or a directory (or name) that transformers loads."""
    kind = library or ("sentencepiece" if path.endswith(".model") else "huggingface")
    if kind not in LOADERS:
        raise StoreError(f"a tokenizer's library is one of {', '.join(LOADERS)}, not {kind!r}")
    try:
        tokenizer: Tokenizer = LOADERS[kind](path)
    except ImportError as error:
        raise StoreError(f'{error}; pip install "nemo-kd[nemo]"') from error
    except Exception as error:  # whatever a library says of a path that it cannot load
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise StoreError(
            f"no {kind} tokenizer at {path} ({reason}); give another with --tokenizer"
        ) from error
    return tokenizer


def store_tokenizer(spec: StoreSpec, path: str | None) -> Tokenizer:
    """The tokenizer at `path`, else the one of the manifest; refused when it is another's."""
    library, own = spec.tokenizer.get("library"), spec.tokenizer.get("path")
    if path is None and own is None:
        raise StoreError(
            "the store does not say where its tokenizer is; give --tokenizer, or --ids"
        )
    tokenizer = load_tokenizer(path) if path is not None else load_tokenizer(str(own), library)
    if tokenizer.vocab_size != spec.vocab_size:
        raise StoreError(
            f"the tokenizer at {path or own} has {tokenizer.vocab_size} tokens, the store "
            f"{spec.vocab_size}; give the right one with --tokenizer"
        )
    return tokenizer
