"""Tokenizers: the interface, an implementation by transformers, and comparison of vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from nemo_kd.errors import NemoKDError
from nemo_kd.store.fingerprint import vocabulary_fingerprint
from nemo_kd.tokenizer_files import load_files
from nemo_kd.vocabulary import VocabularySize


class Vocabulary(Protocol):
    """Interface of a vocabulary: its size and the token of each id."""

    @property
    def vocab_size(self) -> int:
        """The largest id plus 1; an id without a token has None in `ids_to_tokens`."""

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...


class Tokenizer(Vocabulary, Protocol):
    """Interface of a tokenizer, as used by templates, generation and specs; NeMo's satisfy it."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def space_sensitive(self) -> bool:
        """Whether tokenizing `x y` differs from concatenating the tokens of `x` and `y`."""

    def text_to_ids(self, text: str) -> list[int]:
        """Tokenize a text without adding beginning- or end-of-sequence tokens."""

    def ids_to_text(self, ids: Sequence[int]) -> str:
        """Convert tokens to text, omitting special tokens."""


class HFTokenizer:
    """A transformers tokenizer with the behaviour of NeMo's `AutoTokenizer(path, use_fast=True)`.

    As in NeMo, a missing eos token is replaced by sep, a missing bos by cls, and vice versa;
    additional special tokens are ordinary tokens in `ids_to_text`.
    """

    def __init__(self, path: str | Path) -> None:
        self.tokenizer = load_tokenizer(path)
        self.tokenizer.add_special_tokens(_missing_special_tokens(self.tokenizer))
        self._backend: Any = None
        if self.tokenizer.is_fast:  # called directly: a third of the time
            self._backend = self.tokenizer.backend_tokenizer
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocab_size = VocabularySize.of(self.tokenizer).ids
        self.bos_id = self._id(self.tokenizer.bos_token)
        self.eos_id = self._id(self.tokenizer.eos_token)
        self.space_sensitive = self._tokens("x y") != self._tokens("x") + self._tokens("y")

    def text_to_ids(self, text: str) -> list[int]:
        if self._backend is not None:
            encoded: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return encoded
        ids: list[int] = self.tokenizer.convert_tokens_to_ids(self._tokens(text))
        return ids

    def ids_to_text(self, ids: Sequence[int]) -> str:
        special = set(self.tokenizer.all_special_tokens)
        tokens = [token for token in self.ids_to_tokens(ids) if token and token not in special]
        return str(self.tokenizer.convert_tokens_to_string(tokens))

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        tokens: list[str] = self.tokenizer.convert_ids_to_tokens(list(ids))
        return tokens

    def _tokens(self, text: str) -> list[str]:
        tokens: list[str] = self.tokenizer.tokenize(text)
        return tokens

    def _id(self, token: str | None) -> int | None:
        return None if token is None else int(self.tokenizer.convert_tokens_to_ids(token))


def load_tokenizer(path: str | Path) -> Any:
    """Load the fast tokenizer, or the slow one if that fails; raise NemoKDError if both fail.

    Nothing is downloaded, and no code beside the tokenizer is run.
    """
    try:
        return load_files(path)
    except Exception:
        try:
            return load_files(path, use_fast=False)
        except Exception as error:  # transformers raises errors of many types
            raise NemoKDError(
                f"transformers cannot load a tokenizer from {path}: {error}"
            ) from error


def _missing_special_tokens(tokenizer: Any) -> dict[str, Any]:
    tokens: dict[str, Any] = {"additional_special_tokens": []}
    # A token that is added again by its text alone no longer takes the spaces beside it.
    known = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    for one, other in (("sep", "eos"), ("cls", "bos")):
        for name, substitute in ((one, other), (other, one)):
            own, token = (getattr(tokenizer, f"{n}_token") for n in (name, substitute))
            if own is None and token:
                tokens[f"{name}_token"] = known.get(token, token)
    return tokens


PREFIXES = ("\x00", "\n", ".", "a")
"""Texts after which a piece is tokenized, to find its tokens within a text."""


def continuation(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Return a function that tokenizes a text that continues another one.

    Tokenizers such as SentencePiece's put a space before every text; here it must not be there.
    """
    if getattr(tokenizer, "space_sensitive", False):
        return tokenizer.text_to_ids
    prefixes = [(prefix, tokenizer.text_to_ids(prefix)) for prefix in PREFIXES]

    def tokens(text: str) -> list[int]:
        for prefix, alone in prefixes:
            ids = tokenizer.text_to_ids(prefix + text)
            if alone and ids[: len(alone)] == alone:
                return ids[len(alone) :]
        return tokenizer.text_to_ids(text)

    return tokens


def separator_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the separator token; None without one, or if it ends or begins a text too.

    `HFTokenizer`, as NeMo's tokenizers, takes the end-of-sequence token where it is missing.
    """
    inner: Any = getattr(tokenizer, "tokenizer", None)
    token = getattr(inner, "sep_token", None)
    if not token:
        return None
    found = int(inner.convert_tokens_to_ids(token))
    return None if found in (tokenizer.bos_id, tokenizer.eos_id) else found


SHOWN = 5
"""Number of tokens that `tokens_from` names."""


def tokens_from(tokenizer: Vocabulary, size: int) -> str:
    """Name the tokens whose ids are `size` or more, for a message about a smaller model."""
    ids = range(size, tokenizer.vocab_size)
    named = [
        f"{token!r} ({i})"
        for i, token in zip(ids, tokenizer.ids_to_tokens(ids), strict=True)
        if token
    ]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return f"{', '.join(named[:SHOWN])}{more}"


def decoded(tokenizer: Tokenizer, ids: Sequence[int] | NDArray[Any]) -> str:
    """Return the text of all tokens, special ones included where the tokenizer can show them."""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "convert_tokens_to_string"):  # a tokenizer of transformers
        return str(inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return tokenizer.ids_to_text(list(ids))


def tokenizer_fingerprint(tokenizer: Vocabulary) -> str:
    """SHA-256 (hex) over the token of every id, in id order.

    It depends on the vocabulary and its order, not on the tokenizer's path.
    """
    return vocabulary_fingerprint(tokenizer.ids_to_tokens(list(range(tokenizer.vocab_size))))


def first_difference(ours: Vocabulary, origin: Mapping[str, Any]) -> str:
    """Describe the first difference from a store's tokenizer, to append to an error message.

    `origin` is the store's `spec.tokenizer`. Returns an empty string if that is not a Hugging Face
    tokenizer or no longer loads; then only fingerprints can be compared.
    """
    path = Path(str(origin.get("path")))
    if origin.get("library") != "huggingface" or not (path.is_absolute() and path.is_dir()):
        return ""  # a store may come from anyone: no relative path, no name on the hub
    try:
        theirs = HFTokenizer(path)
    except NemoKDError:
        return ""
    common = list(range(min(ours.vocab_size, theirs.vocab_size)))
    pairs = zip(theirs.ids_to_tokens(common), ours.ids_to_tokens(common), strict=True)
    for i, (stored, own) in enumerate(pairs):
        if stored != own:
            return f"; the first difference is id {i}: {stored!r} in the store, {own!r} here"
    return (
        f"; the store's has {theirs.vocab_size} tokens, this one {ours.vocab_size}, and the first "
        f"{len(common)} are equal"
    )
