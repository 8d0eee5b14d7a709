"""Tokenizers for the eye: ids to text, from what a store's manifest says or from a path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_kd.errors import StoreError
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

        self._tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        # Not their number: ids may have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1

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


KINDS = "a Hugging Face tokenizer's directory or a SentencePiece .model file"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
LONGEST_REASON = 200  # characters: transformers lists every model that it knows
LOADERS: dict[str, Any] = {
    loader.library: loader for loader in (HuggingFaceTokenizer, SentencePieceTokenizer)
}


def check_tokenizer_path(path: str, library: str | None = None) -> str:
    """The library that loads `path`, judged by the file names alone, before any slow import.

    A `.model` file is SentencePiece's, a directory Hugging Face's. Nothing is ever downloaded, so a
    name on a hub is refused like any path that does not exist.
    """
    kind = library or ("sentencepiece" if path.endswith(".model") else "huggingface")
    if kind not in LOADERS:
        raise StoreError(f"a tokenizer's library is one of {', '.join(LOADERS)}, not {kind!r}")
    place = Path(path)
    if not place.exists():
        raise StoreError(
            f"no tokenizer at {path}: there is no such file or directory (nothing is downloaded); "
            f"give {KINDS} with --tokenizer"
        )
    if kind == "sentencepiece":
        if not place.is_file():
            raise StoreError(f"{path} is a directory, expected a SentencePiece .model file")
    elif not place.is_dir():
        raise StoreError(
            f"{path} is a file; give {KINDS} with --tokenizer"
            + (f": {place.parent}" if place.name in TOKENIZER_FILES else "")
        )
    elif not any((place / name).is_file() for name in TOKENIZER_FILES):
        (model, *_) = [*sorted(place.glob("*.model")), None]
        hint = f"; give the file itself, --tokenizer {model}" if model else ""
        raise StoreError(f"{path} has none of {', '.join(TOKENIZER_FILES)}{hint}")
    return kind


def load_tokenizer(path: str, library: str | None = None) -> Tokenizer:
    """The tokenizer of a SentencePiece `.model` file or a Hugging Face directory; never a hub's."""
    kind = check_tokenizer_path(path, library)
    try:
        tokenizer: Tokenizer = LOADERS[kind](path)
    except ImportError as error:
        package = "transformers" if kind == "huggingface" else kind
        raise StoreError(f"{error}; a {kind} tokenizer needs pip install {package}") from error
    except Exception as error:  # whatever a library says of a path that it cannot load
        reason = (str(error).strip() or repr(error)).splitlines()[0][:LONGEST_REASON]
        raise StoreError(
            f"no {kind} tokenizer at {path} ({reason}); give another with --tokenizer"
        ) from error
    return tokenizer


def check_store_tokenizer(spec: StoreSpec, path: str | None) -> tuple[str, str]:
    """(path, library) of the tokenizer at `path`, else of the manifest's; nothing is loaded."""
    library, own = spec.tokenizer.get("library"), spec.tokenizer.get("path")
    if path is not None:
        return path, check_tokenizer_path(path)
    if own is None:
        raise StoreError(
            f"the store does not say where its tokenizer is; give {KINDS} with --tokenizer, or "
            "--ids to see ids"
        )
    if not Path(str(own)).exists():
        raise StoreError(
            f"the store's own tokenizer, {own}, is not on this machine; give {KINDS} with "
            "--tokenizer, or --ids to see ids"
        )
    return str(own), check_tokenizer_path(str(own), library)


def store_tokenizer(spec: StoreSpec, path: str | None) -> Tokenizer:
    """The tokenizer at `path`, else the one of the manifest; refused when it is another's."""
    path, library = check_store_tokenizer(spec, path)
    tokenizer = load_tokenizer(path, library)
    if tokenizer.vocab_size != spec.vocab_size:
        raise StoreError(
            f"the tokenizer at {path} has {tokenizer.vocab_size} tokens, the store "
            f"{spec.vocab_size}; give the right one with --tokenizer"
        )
    return tokenizer
