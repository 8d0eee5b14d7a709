"""What a dump asks of a teacher, which the room of its framework answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from nemo_kd.sft.rows import Row
from nemo_kd.sft.tokenizer import Tokenizer
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.generation.step import Answers, Decoding, Prompt
from nemo_kd.teacher.layout import Layout
from nemo_kd.topk import TopK


class Forward(Protocol):
    """A pass of the teacher: rows → the top-K of their answer tokens, on the CPU.

    None on ranks without logits.
    """

    def __call__(self, rows: Sequence[Row], micro_batch_size: int) -> list[TopK] | None: ...


class Writer(Protocol):
    """Generation: prompts → finished answers with the top-K of their tokens; None as `Forward`."""

    def __call__(self, prompts: Sequence[Prompt]) -> Answers | None: ...


class Teacher(Protocol):
    """A loaded teacher."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def tokenizer_origin(self) -> Mapping[str, Any]:
        """`library` and `path` of the store's spec; a path of None cannot be loaded again."""

    @property
    def layout(self) -> Layout: ...
    @property
    def sep_id(self) -> int: ...
    @property
    def virtual_tokens(self) -> int: ...
    @property
    def max_positions(self) -> int | None:
        """The largest number of tokens in a row if positions are learned; None without a limit."""

    def forward(self, spec: StoreSpec, rows_per_lm_head: int) -> Forward: ...

    def writer(self, spec: StoreSpec, decoding: Decoding) -> Writer: ...
