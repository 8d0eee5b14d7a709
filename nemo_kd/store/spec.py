"""The settings that, together with the source rows, determine a store's bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nemo_kd.errors import StoreError
from nemo_kd.files import decode_json, sha256_of_json
from nemo_kd.store.schema import MAX_TEMPERATURES, check_plain, check_tokenizer

MAX_VOCABULARY = 1 << 32
MAX_TOP_K = 1 << 20
ROWS_PER_SHARD = 256


@dataclass(frozen=True)
class StoreSpec:
    """Settings of a store; equal specs and equal source rows give byte-identical stores."""

    top_k: int
    """K: the maximum number of logits kept per answer token."""

    vocab_size: int
    """V: size of the tokenizer's vocabulary, without Megatron's padding. Ids are in [0, V)."""

    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures T at which `log Σ_v exp(z_v / T)` is stored; they must include 1.0."""

    rows_per_shard: int = field(default=ROWS_PER_SHARD, compare=False)
    """While it is written, shard i holds source rows [i * rows_per_shard, (i + 1) *
    rows_per_shard). A finished store does not record it."""

    profile: str = "plain"
    """How the teacher's top-K is encoded: plain, compact, top_p or sampled."""

    profile_options: dict[str, Any] = field(default_factory=dict)
    """Options of the profile."""

    tokenizer: dict[str, Any] = field(default_factory=dict)
    """The tokenizer's `fingerprint`, and the `library` and `path` to load it."""

    teacher: dict[str, Any] = field(default_factory=dict)
    """Name and fingerprint of the checkpoint."""

    template: dict[str, Any] = field(default_factory=dict)
    """Prompt template and truncation settings that determine a row's tokens."""

    source: dict[str, Any] = field(default_factory=dict)
    """The SFT file: its name, number of rows and SHA-256."""

    def __post_init__(self) -> None:
        for name in ("top_k", "vocab_size", "rows_per_shard"):
            if type(getattr(self, name)) is not int:
                raise StoreError(f"{name} must be an integer, not {getattr(self, name)!r}")
        if not isinstance(self.profile, str):
            raise StoreError(f"profile must be a name, not {self.profile!r}")
        object.__setattr__(self, "temperatures", _numbers(self.temperatures))
        for name in ("profile_options", "tokenizer", "teacher", "template", "source"):
            object.__setattr__(self, name, _plain_json(name, getattr(self, name)))
        if not 0 < self.vocab_size <= MAX_VOCABULARY:
            raise StoreError(f"vocab_size must be in [1, {MAX_VOCABULARY}], not {self.vocab_size}")
        if not 0 < self.top_k <= self.vocab_size:
            raise StoreError(
                f"top_k must be in [1, vocab_size={self.vocab_size}], not {self.top_k}"
            )
        if self.top_k > MAX_TOP_K:
            raise StoreError(f"top_k must be at most {MAX_TOP_K}, not {self.top_k}")
        if self.rows_per_shard < 1:
            raise StoreError(f"rows_per_shard must be at least 1, not {self.rows_per_shard}")
        if any(not 0 < t < float("inf") for t in self.temperatures):
            raise StoreError(f"temperatures must be positive, not {list(self.temperatures)}")
        if len(set(self.temperatures)) < len(self.temperatures) or 1.0 not in self.temperatures:
            raise StoreError(
                "temperatures must be distinct and include 1.0 (stored log-probabilities are "
                f"relative to the log-sum-exp at 1.0), not {list(self.temperatures)}"
            )

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the spec's canonical JSON."""
        return sha256_of_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the spec as stored in `manifest.json`, without the rows per shard."""
        value = self.resumable_json()
        del value["rows_per_shard"]
        return value

    def resumable_json(self) -> dict[str, Any]:
        """Return the spec as stored in `spec.json` while a store is written."""
        return {**asdict(self), "temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, value: Any, rows_per_shard: int = ROWS_PER_SHARD) -> StoreSpec:
        """Inverse of `to_json` and `resumable_json`; `rows_per_shard` if the value has none.

        Raises StoreError if keys or values are invalid.
        """
        names = {f.name for f in fields(cls)}
        if isinstance(value, dict):
            value = {"rows_per_shard": rows_per_shard, **value}
        if not isinstance(value, dict) or set(value) != names:
            got = sorted(value) if isinstance(value, dict) else value
            raise StoreError(f"a store's spec must have the keys {sorted(names)}, not {got}")
        try:
            return cls(**value)
        except StoreError:
            raise
        except (TypeError, ValueError) as error:
            raise StoreError(f"a store's spec has a value of the wrong type: {error}") from error

    def differences(self, other: StoreSpec) -> list[tuple[str, Any, Any]]:
        """Return (dotted field, own value, other value) for each field that differs.

        The rows per shard, which a finished store does not have, are not compared.
        """
        ours, theirs = dict(leaves("", self.to_json())), dict(leaves("", other.to_json()))
        return [
            (name, ours.get(name), theirs.get(name))
            for name in sorted(ours | theirs)
            if ours.get(name) != theirs.get(name)
        ]

    def named_as(self, earlier: StoreSpec) -> StoreSpec:
        """Return this spec with the names and paths of `earlier` whose content has not changed."""
        ours, theirs = dict(leaves("", self.to_json())), dict(leaves("", earlier.to_json()))
        value = self.resumable_json()
        for name, contents in NAMED.items():
            known = [c for c in contents if ours.get(c) or theirs.get(c)]
            same = known and all(ours.get(c) == theirs.get(c) for c in known)
            if same and name in ours and name in theirs:
                block, key = name.split(".")
                value[block][key] = theirs[name]
        return self.from_json(value)


def is_greedy(template: Mapping[str, Any]) -> bool:
    """Whether the answers of a store were generated at temperature 0, where no seed decides."""
    generation = template.get("generation")
    return isinstance(generation, Mapping) and generation.get("temperature") == 0


NAMED = {
    "tokenizer.path": ("teacher.fingerprint", "teacher.tokenizer"),
    "teacher.name": ("teacher.fingerprint",),
    "source.name": ("source.sha256",),
}
"""Names and paths, and the hashes of what they name, of which one is known."""


def _plain_json(name: str, value: Any) -> Any:
    """Round-trip the value through JSON, so that a spec equals itself when read back."""
    if not isinstance(value, dict):
        raise StoreError(f"{name} must be a mapping, not {value!r}")
    try:
        plain: dict[str, Any] = decode_json(json.dumps(value, allow_nan=False))
        check_plain(plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{name} must hold plain JSON values: {error}") from error
    if name == "tokenizer":
        check_tokenizer(plain)
    return plain


def _numbers(temperatures: Any) -> tuple[float, ...]:
    if isinstance(temperatures, str):
        raise StoreError(f"temperatures must be numbers, not the text {temperatures[:50]!r}")
    try:
        found = tuple(float(t) for t in temperatures)
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"temperatures must be numbers: {error}") from error
    if len(found) > MAX_TEMPERATURES:
        raise StoreError(f"at most {MAX_TEMPERATURES} temperatures are stored, not {len(found)}")
    return found


def leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with their dotted keys; an empty mapping is a value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, value
