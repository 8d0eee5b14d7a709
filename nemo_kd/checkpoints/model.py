"""A causal language model in a checkpoint: its sizes and constants, and what a reader provides.

Readers (`huggingface.py`, `gguf_file.py`) provide a `Model` and tensors under Hugging Face's names
to the writer (`megatron.py`); `families.py` says how the two are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
import torch

from nemo_kd.errors import NemoKDError
from nemo_kd.vocabulary import VocabularySize

Value = TypeVar("Value")


class CheckpointError(NemoKDError):
    """A checkpoint that cannot be read, or cannot be converted without changing the model."""


@contextmanager
def reading(name: str, what: str = "it is damaged or not complete") -> Iterator[None]:
    """Context manager that raises CheckpointError in one line for a damaged file.

    A checkpoint may come from anyone, and the libraries that read one raise errors of any type.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:MAX_REASON]
        raise CheckpointError(f"{name}: {what} ({reason})") from error


def checked(name: str, values: Mapping[str, Any], kind: type[Value]) -> Value:
    """Return values of the file `name` as `kind`; raise CheckpointError for a wrong one."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{name}: {error}") from error


MAX_REASON = 300  # characters
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e30)]
Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling: wavelengths beyond the original context are stretched by `factor`."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_context: Size


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `fraction` of each head.

    Pair i of d rotated dimensions turns by `base ** (-2 i / d)` per position, unless changed.
    """

    base: Positive
    fraction: Fraction = 1.0
    interpolation: Positive | None = None
    """Divisor of all positions (linear scaling)."""
    llama3: RopeScaling | None = None
    frequencies: tuple[float, ...] | None = None
    """Angle per position of each pair, for other scalings; `base` is not used then."""
    attention_factor: Positive = 1.0
    """Multiplies queries and keys after the rotation."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of each layer's MLP."""

    number: Size
    active: Size
    """Experts that see a token."""
    ffn_hidden_size: Size
    normalized: bool
    """Whether the weights of the active experts sum to one."""


@dataclass(frozen=True)
class Model:
    """Sizes and constants of a model; its family has what all models of an architecture share."""

    architecture: str
    """Key of `families.FAMILIES`."""
    num_layers: Layers
    hidden_size: Size
    ffn_hidden_size: Size
    num_heads: Size
    num_kv_heads: Size
    """Query groups; equal to `num_heads` without grouped-query attention."""
    head_dim: Size
    vocab_size: Size
    """Rows of the embedding, which may exceed the tokenizer's vocabulary."""
    context: Size
    norm_eps: Positive
    rope: Rope
    tied: bool
    """Whether the LM head shares the embedding's weight."""
    experts: Experts | None = None
    window: Size | None = None
    """Tokens that a position attends to, itself included; None: all before it."""
    max_tokens: Size | None = None
    """Rows of more tokens need a setting that Megatron does not have; None without a limit."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads"
                " evenly; grouped-query attention needs a divisor"
            )

    @classmethod
    def of(cls, name: str, **values: Any) -> Model:
        """Build a model from values of the file `name`; raise CheckpointError for a wrong one."""
        return checked(name, values, cls)


class Checkpoint(Protocol):
    """An open checkpoint, whose tensors are read on access."""

    model: Model
    dtype: torch.dtype
    """The type of most weights; float32 for quantised weights."""
    name: str

    @property
    def config(self) -> Mapping[str, Any]:
        """The whole `config.json`, or what it would have for a file of another format."""

    @property
    def generation_config(self) -> Mapping[str, Any] | None:
        """The whole `generation_config.json`; None without one."""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a Hugging Face name."""

    def dtype_of(self, name: str) -> torch.dtype:
        """The type of the tensor of a Hugging Face name."""

    def save_tokenizer(self, directory: str) -> VocabularySize:
        """Write a tokenizer that transformers loads to `directory`; return its vocabulary size."""


def finite(name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor; raise CheckpointError if a value is NaN or infinite."""
    # Either is NaN if a value is; unlike `isfinite(tensor)`, this takes no memory.
    if not all(map(math.isfinite, map(float, torch.aminmax(tensor)))):
        raise CheckpointError(f"{name}: {key} has values that are NaN or infinite")
    return tensor
