"""The sizes that the parts of `make gpu` run, on a GPU and in the tests on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Sizes:
    device: str
    losses: tuple[tuple[int, int], ...]
    """(N, V), those of most interest first."""
    heads: tuple[tuple[int, int, int], ...]
    """(N, V, H)"""
    topks: tuple[tuple[int, int], ...]
    copied: int = 1 << 30
    """Bytes."""
    k: int = 100
    model: dict[str, int] = field(default_factory=dict)
    """A Llama by the names of transformers' `LlamaConfig`; its embedding is tied."""
    sequences: int = 4
    tokens: int = 1024
    """Per sequence."""
    steps: int = 10
    rows: int = 64
    """Of a dump."""


GPU = Sizes(
    device="cuda",
    losses=tuple((n, v) for n in (8192, 4096, 32_768) for v in (128_256, 151_936, 49_152, 262_144)),
    heads=((8192, 128_256, 4096), (8192, 49_152, 576), (8192, 151_936, 5120)),
    topks=((8192, 128_256), (8192, 49_152), (8192, 151_936), (8192, 262_144)),
    model={  # of Llama 3.2 1B
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
)
TINY = Sizes(
    device="cpu",
    losses=((8, 1000),),
    heads=((8, 1000, 16),),
    topks=((8, 1000),),
    copied=1 << 20,
    k=20,
    model={
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    sequences=2,
    tokens=16,
    steps=2,
    rows=4,
)
