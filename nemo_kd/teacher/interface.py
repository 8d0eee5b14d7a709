"""Interface between a dump and a teacher, implemented in one package per framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from nemo_kd.sft import RowError
from nemo_kd.sft.rows import Row
from nemo_kd.sft.tokenizer import Tokenizer
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.generation.step import Answers, Decoding, Prompt
from nemo_kd.teacher.layout import Layout
from nemo_kd.topk import TopK


class Forward(Protocol):
    """A forward pass: maps rows to the top-K of their answer tokens, on the CPU.

    A RowError in place of a row's top-K says why there is none. Returns None on ranks without
    logits.
    """

    def __call__(
        self, rows: Sequence[Row], micro_batch_size: int
    ) -> Iterable[TopK | RowError] | None: ...


class Writer(Protocol):
    """Generation: maps prompts to answers with the top-K of their tokens.

    Returns None on ranks without logits.
    """

    def __call__(self, prompts: Sequence[Prompt]) -> Answers | None: ...


class Teacher(Protocol):
    """A loaded teacher model with its tokenizer and its layout over processes."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def tokenizer_origin(self) -> Mapping[str, Any]:
        """`library` and `path` to record in the store's spec; path None: cannot be reloaded."""

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """`teacher` in the store's spec; None: `teacher_identity` of the configured checkpoint."""

    @property
    def layout(self) -> Layout: ...
    @property
    def sep_id(self) -> int: ...
    @property
    def virtual_tokens(self) -> int: ...
    @property
    def max_positions(self) -> int | None:
        """Maximum number of tokens per row for learned positions; None without a limit."""

    def regime(self, positions: int) -> int:
        """Return which of the model's regimes a row with this number of positions is computed in.

        A row's logits are right only among rows of its own regime. 0 for a model with only one.
        """

    def forward(self, spec: StoreSpec, rows_per_lm_head: int) -> Forward: ...

    def writer(self, spec: StoreSpec, decoding: Decoding) -> Writer: ...
