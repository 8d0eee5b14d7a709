"""Tokenizers that convert ids to text, loaded from a path or as recorded in a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_kd.errors import StoreError
from nemo_kd.sft.tokenizer import tokenizer_fingerprint
from nemo_kd.store.spec import StoreSpec
from nemo_kd.tokenizer_files import load_files
from nemo_kd.vocabulary import VocabularySize


class Tokenizer(Protocol):
    """Interface of a tokenizer that can be fingerprinted and can convert ids to text."""

    vocab_size: int
    pad_id: int | None
    """The id of the pad token; None if there is none, or it is also an end of sequence."""

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...

    def text(self, ids: Sequence[int]) -> str: ...


class HuggingFaceTokenizer:
    """The tokenizer in a Hugging Face directory."""

    library = "huggingface"

    def __init__(self, path: str) -> None:
        self._tokenizer = load_files(path)
        self.vocab_size = VocabularySize.of(self._tokenizer).ids
        pad, end = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        self.pad_id: int | None = None if pad == end else pad

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        tokens: list[str] = self._tokenizer.convert_ids_to_tokens(list(ids))
        return tokens

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


class SentencePieceTokenizer:
    """A SentencePiece model file."""

    library = "sentencepiece"

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=path)
        self.vocab_size = int(self._processor.get_piece_size())
        pad = int(self._processor.pad_id())
        self.pad_id: int | None = None if pad < 0 else pad

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(self._processor.id_to_piece(int(i))) for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def _bytes(self, i: int) -> bytes:
        piece = str(self._processor.id_to_piece(int(i)))
        if self._processor.is_byte(int(i)):  # <0xE6>, a part of a character
            return bytes([int(piece[1:-1], 16)])
        return piece.replace("▁", " ").encode("utf-8", "replace")


class Ids:
    """Stand-in for a tokenizer that shows ids as `⟨17⟩`."""

    vocab_size = 0
    pad_id: int | None = None

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [f"⟨{i}⟩" for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.ids_to_tokens(ids))


class RunningText:
    """Decode tokens one after another: a token's text is what it adds to those before it.

    A character of several tokens is the text of the last one; that of the others is empty. Only a
    few tokens are decoded again, those since the last complete character and those before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        """The tokens of the last text, which decide on spaces after them."""
        self._open: list[int] = []
        """The tokens since then, of an incomplete character."""

    def peek(self, token: int) -> str:
        """Return the text that `token` would add."""
        return self._added(token)[0]

    def push(self, token: int) -> str:
        """Return the text that `token` adds."""
        text, complete = self._added(token)
        self._open.append(token)
        if complete:
            self._shown, self._open = self._open, []
        return text

    def rest(self) -> str:
        """Return the text of an incomplete character at the end; empty without one."""
        return self._tokenizer.text(self._open) if self._open else ""

    def _added(self, token: int) -> tuple[str, bool]:
        ids = [*self._open, token]
        before, text = self._tokenizer.text(self._shown), self._tokenizer.text(self._shown + ids)
        added = text[len(before) :] if text.startswith(before) else self._tokenizer.text(ids)
        if added.endswith(REPLACEMENT) and len(ids) < MAX_CHARACTER_BYTES:
            return "", False
        return added, True


REPLACEMENT = "\ufffd"
"""What stands for bytes that are no character, or not yet."""
MAX_CHARACTER_BYTES = 4  # in UTF-8
KINDS = "a Hugging Face tokenizer's directory or a SentencePiece .model file"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
MAX_REASON = 200  # characters: transformers lists every model that it supports
LOADERS: dict[str, Any] = {
    loader.library: loader for loader in (HuggingFaceTokenizer, SentencePieceTokenizer)
}


def check_tokenizer_path(path: str, library: str | None = None) -> str:
    """Determine the library that loads `path` from file names, without a slow import.

    A `.model` file is loaded by SentencePiece, a directory by Hugging Face. Nothing is downloaded:
    the name of a model on the hub is rejected like any path that does not exist.
    """
    kind = library or ("sentencepiece" if path.endswith(".model") else "huggingface")
    if kind not in LOADERS:
        raise StoreError(f"a tokenizer's library must be {' or '.join(LOADERS)}, not {kind!r}")
    found = Path(path)
    if not found.exists():
        raise StoreError(
            f"no tokenizer at {path}: no such file or directory (nothing is downloaded); give "
            f"{KINDS} with --tokenizer"
        )
    if kind == "sentencepiece":
        if not found.is_file():
            raise StoreError(f"{path} is a directory, expected a SentencePiece .model file")
    elif not found.is_dir():
        raise StoreError(
            f"{path} is a file; give {KINDS} with --tokenizer"
            + (f": {found.parent}" if found.name in TOKENIZER_FILES else "")
        )
    elif not any((found / name).is_file() for name in TOKENIZER_FILES):
        (model, *_) = [*sorted(found.glob("*.model")), None]
        hint = f"; give the file itself, --tokenizer {model}" if model else ""
        raise StoreError(f"{path} has none of {', '.join(TOKENIZER_FILES)}{hint}")
    return kind


def load_tokenizer(path: str, library: str | None = None) -> Tokenizer:
    """Load a SentencePiece `.model` file or a Hugging Face directory; never from a hub."""
    kind = check_tokenizer_path(path, library)
    try:
        tokenizer: Tokenizer = LOADERS[kind](path)
    except ImportError as error:
        package = "transformers" if kind == "huggingface" else kind
        raise StoreError(f"{error}; a {kind} tokenizer needs pip install {package}") from error
    except Exception as error:  # libraries raise errors of any type for a bad path
        reason = (str(error).strip() or repr(error)).splitlines()[0][:MAX_REASON]
        raise StoreError(
            f"no {kind} tokenizer at {path} ({reason}); give another with --tokenizer"
        ) from error
    return tokenizer


def shown_tokenizer(spec: StoreSpec, path: str | None) -> tuple[Tokenizer, str]:
    """Return the tokenizer at `path` (None: the store's), and the reason if it only shows ids.

    Raises StoreError if the tokenizer at `path` does not load or has another vocabulary size.
    """
    if path is None:
        try:
            return recorded_tokenizer(spec), ""
        except StoreError as error:
            return Ids(), f"showing ids: {error}"
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size != spec.vocab_size:
        raise StoreError(
            f"the tokenizer at {path} has {tokenizer.vocab_size} tokens, but the store has "
            f"{spec.vocab_size}; give the store's tokenizer with --tokenizer"
        )
    return tokenizer, ""


def recorded_tokenizer(spec: StoreSpec) -> Tokenizer:
    """Load the tokenizer that a store records; raise StoreError unless its fingerprint matches.

    A store may come from anyone: its tokenizer is loaded from an absolute path on this machine
    only, without code from that path and without a hub.
    """
    path, fingerprint = spec.tokenizer.get("path"), spec.tokenizer.get("fingerprint")
    if path is None or fingerprint is None:
        raise StoreError(
            f"the store does not record its tokenizer's path and fingerprint; give {KINDS} with "
            "--tokenizer"
        )
    if not Path(path).is_absolute() or not Path(path).exists():
        raise StoreError(
            f"the store's tokenizer, {path}, is not an absolute path on this machine; give {KINDS} "
            "with --tokenizer"
        )
    tokenizer = load_tokenizer(path, spec.tokenizer.get("library"))
    if tokenizer_fingerprint(tokenizer) != fingerprint:
        raise StoreError(
            f"{path} is another tokenizer than the store's: the fingerprints differ; give {KINDS} "
            "with --tokenizer"
        )
    return tokenizer
