"""DistillKit's compression of a token's K log-probabilities, decoded.

A token's `compressed_logprobs` are, one after another and little-endian,

    exact         exact_k values of exact_dtype
    coefficients  one of term_dtype for each of polynomial_terms, of the other K - exact_k values
    bins          for each of residual_bins: a scale of scale_dtype, then num_elements integers of
                  element_bits each, most significant bit first, padded to a byte

and its `bytepacked_indices` are K ids of ceil(log2(d)) bits each, packed like a bin. With
`delta_encoding` the values are differences from the value before. The format is that of
DistillKit's `distillkit/compression/` (`monotonic_logprobs.py`, `bitpack.py`, `config.py`); dtypes
are those in which its reader computes, so that the values are the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.spec import MAX_TOP_K, MAX_VOCABULARY

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_Dtype = Literal["float16", "bfloat16", "float32", "float64"]
_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP_K)]
_Bits = Annotated[int, msgspec.Meta(ge=1, le=62)]
_Power = Annotated[int, msgspec.Meta(ge=-64, le=64)]
MAX_PARTS = 64  # terms, and bins
LEGACY = "legacy_logit_compression"


class Bin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Residuals that share a scale."""

    scale_dtype: _Dtype
    element_bits: _Bits
    num_elements: _Count


class Compression(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of a capture, as in its `compression_config.yaml`."""

    d: Annotated[int, msgspec.Meta(ge=2, le=MAX_VOCABULARY)]
    k: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOP_K)]
    exact_k: _Count
    residual_bins: Annotated[list[Bin], msgspec.Meta(max_length=MAX_PARTS)]
    exact_dtype: _Dtype = "float32"
    polynomial_terms: (
        Annotated[list[_Power | Literal["sqrt", "exp"]], msgspec.Meta(max_length=MAX_PARTS)] | None
    ) = None
    term_dtype: _Dtype = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def index_bits(self) -> int:
        """Bits of an id."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def index_bytes(self) -> int:
        return (self.k * self.index_bits + 7) // 8

    @property
    def value_bytes(self) -> int:
        terms = len(self.polynomial_terms or []) * _size(self.term_dtype)
        bins = sum(_size(b.scale_dtype) + _packed(b) for b in self.residual_bins)
        return self.exact_k * _size(self.exact_dtype) + terms + bins


def compression_of(value: Any) -> Compression:
    """Return the settings in a decoded configuration, of a capture or of a training."""
    for _ in range(2):  # a training's: teacher.logprob_compressor
        if isinstance(value, dict):
            value = value.get("teacher", value)
            if LEGACY in value if isinstance(value, dict) else False:
                raise StoreError(
                    f"{LEGACY} is not supported: its values are relative to the mean logit, and "
                    "the log-sum-exp is not recorded"
                )
            value = value.get("logprob_compressor", value) if isinstance(value, dict) else value
    try:
        found = msgspec.convert(value, Compression)
    except msgspec.ValidationError as error:
        raise StoreError(f"not a configuration of DistillKit's compression: {error}") from error
    rest = found.k - found.exact_k
    binned = sum(each.num_elements for each in found.residual_bins)
    if rest < binned or (rest and not found.polynomial_terms and not binned):
        raise StoreError(
            f"not a configuration of DistillKit's compression: k={found.k}, exact_k="
            f"{found.exact_k} and {binned} elements in residual_bins do not fit"
        )
    return found


def decoded_ids(octets: NDArray[np.uint8], of: Compression) -> NDArray[np.int64]:
    """Return the ids [A, K] of `bytepacked_indices` [A, bytes]."""
    if octets.shape[1] != of.index_bytes:
        raise StoreError(_misfit("bytepacked_indices", octets.shape[1], of.index_bytes))
    return _integers(octets, of.index_bits, of.k)


def decoded_logprobs(octets: NDArray[np.uint8], of: Compression) -> NDArray[np.float32]:
    """Return the log-probabilities [A, K] of `compressed_logprobs` [A, bytes]."""
    if octets.shape[1] != of.value_bytes:
        raise StoreError(_misfit("compressed_logprobs", octets.shape[1], of.value_bytes))
    parts, kind = _Parts(octets), _DTYPES[of.exact_dtype]
    exact = parts.floats(of.exact_dtype, of.exact_k)
    terms = of.polynomial_terms or []
    coefficients = parts.floats(of.term_dtype, len(terms))
    rest = of.k - of.exact_k
    bins = [parts.residuals(each) for each in of.residual_bins]
    residual = torch.cat([*bins, torch.zeros(len(octets), rest)], 1)[:, :rest]
    values = residual.to(kind)
    if terms and rest:
        points = _points(terms, rest, of)  # [rest, terms]
        values = (points * coefficients[:, None]).sum(-1) + values
    values = torch.cat([exact, values], 1)
    if of.delta_encoding:
        values = values.float().cumsum(-1).to(kind)
    decoded: NDArray[np.float32] = values.float().numpy()
    return decoded


def _points(terms: list[Any], count: int, of: Compression) -> torch.Tensor:
    """Return the polynomial's terms at the values 0, 1, 2, ... or from 0 to 1 [count, terms]."""
    dtype = _DTYPES[of.term_dtype]
    at = (
        torch.linspace(0, 1, steps=count, dtype=dtype)
        if of.normalize_t
        else torch.arange(count, dtype=dtype)
    )
    named = {"sqrt": torch.sqrt, "exp": torch.exp}
    return torch.stack([named[t](at) if isinstance(t, str) else at**t for t in terms], -1)


class _Parts:
    """The parts of octets [A, bytes], read from left to right."""

    def __init__(self, octets: NDArray[np.uint8]) -> None:
        self._octets, self._start = octets, 0

    def _take(self, count: int) -> NDArray[np.uint8]:
        taken = self._octets[:, self._start : self._start + count]
        self._start += count
        return np.ascontiguousarray(taken)

    def floats(self, dtype: str, count: int) -> torch.Tensor:
        octets = torch.from_numpy(self._take(count * _size(dtype)).copy())
        if not octets.numel():
            return torch.zeros(len(octets), count, dtype=_DTYPES[dtype])
        return octets.view(_DTYPES[dtype])

    def residuals(self, of: Bin) -> torch.Tensor:
        scale = self.floats(of.scale_dtype, 1)
        integers = _integers(self._take(_packed(of)), of.element_bits, of.num_elements)
        if of.element_bits == 1:
            return torch.from_numpy(integers).float().mul(2).sub(1) * scale
        return torch.from_numpy(integers - (1 << of.element_bits - 1)).float() * scale


def _integers(octets: NDArray[np.uint8], width: int, count: int) -> NDArray[np.int64]:
    """Unpack `count` integers of `width` bits, most significant first, from each row."""
    bits = np.unpackbits(octets, axis=1)[:, : width * count].reshape(len(octets), count, width)
    integers = np.zeros(bits.shape[:2], np.int64)
    for place in range(width):  # without the int64 copy of all bits
        integers = integers << 1 | bits[:, :, place]
    return integers


def _size(dtype: str) -> int:
    return _DTYPES[dtype].itemsize


def _packed(of: Bin) -> int:
    return (of.element_bits * of.num_elements + 7) // 8


def _misfit(name: str, found: int, expected: int) -> str:
    return (
        f"{name} has {found} bytes per token, but the compression's settings make {expected}; give "
        "the configuration of this capture"
    )
