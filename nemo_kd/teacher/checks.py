"""Check a teacher on two rows before the first shard: what do a row's logits depend on?

The logits at a position must be those of the row's tokens up to it, whatever stands after them, in
the other rows of the micro-batch, and in earlier micro-batches. Where a micro-batch of rows of
several lengths gives others, rows run with rows of their own length, or alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.errors import NemoKDError
from nemo_kd.sft import RowError
from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.config import DumpConfig
from nemo_kd.teacher.interface import Teacher
from nemo_kd.topk import TopK

POSITIONS = 48
"""Number of positions of a row that are compared."""

IDS = 64
"""Number of the largest logits that are compared at a position."""

TOLERANCES = {"32": 1e-4, "16": 2**-7, "bf16": 2**-5}
"""Largest difference of a logit, relative to the row's largest, by the part of `trainer.precision`
before the dash.

Another shape of a batch adds in another order: an error of a few units in the last place (2^-24,
2^-11 and 2^-8 of the value), carried through all layers.
"""

TF32 = 2**-8
"""The tolerance in float32 where matrix products have TF32's 2^-11."""

ROUTED = 0.1
"""Fraction of positions that may differ more in 16 bits, where rounding may choose another expert
of a mixture. None may in float32."""

LEAST = 16
"""Number of tokens that a shorter row is repeated to, so that later tokens can be changed."""


class TeacherError(NemoKDError):
    """A teacher whose logits are not those of a row's own earlier tokens."""


@dataclass(frozen=True)
class Company:
    """Which rows may share a forward pass."""

    group: Callable[[int], object] = lambda positions: 0
    """Rows share a pass if this function of their number of positions has the same value."""

    alone: bool = False
    """Whether each row has a pass of its own."""


def check_teacher(
    config: DumpConfig, teacher: Teacher, spec: StoreSpec, rows: Sequence[Row]
) -> Company:
    """Run the teacher on the first and the last of `rows`; return which rows may share a pass.

    `rows`: one or more, of ascending lengths. Six or seven passes of one or two rows. Collective
    over all ranks, which must give the same rows: the passes, and an all-reduce of a number after
    most of them. A server makes its own batches: its teacher is not checked.

    Errors: TeacherError if logits change from pass to pass or with later tokens.
    """
    if config.teacher.kind == "served":
        return Company()
    probe = _Probe(config, teacher, spec)
    short, long = _short_and_long(rows, probe.most)
    changed = _changed(long, spec.vocab_size)
    partner = _partner(short, long, changed, probe)
    first = probe(short)[0]
    alone = {row: probe(row)[0] for row in dict.fromkeys((partner, long, changed))}
    together = probe(long, partner)
    if probe.differs(first, probe(short)[0]):
        raise TeacherError(
            "the teacher's logits of a row change from one pass to the next (dropout, or a state "
            "that a pass leaves behind): it cannot be a teacher"
        )
    if probe.differs(alone[long], alone[changed], int(long.loss_mask[: _middle(long) + 1].sum())):
        raise TeacherError(
            f"the teacher's logits change with later tokens (row {long.row}, other tokens from "
            f"position {_middle(long)} on): it is not a causal language model; a model that was "
            "trained as a decoder needs its setting for it, such as is_decoder=true in config.json"
        )
    if probe.agree(alone, (long, partner), together):
        return Company(teacher.regime)
    same = probe.agree(alone, (long, changed), probe(long, changed))
    teacher.layout.say(
        "the teacher's logits of a row depend on the other rows of its micro-batch: "
        + ("rows run with rows of their own length" if same else "each row runs alone")
    )
    return Company(group=lambda positions: positions, alone=not same)


def _small(spec: StoreSpec) -> StoreSpec:
    """The spec of what is compared: the largest logits, whatever the store keeps."""
    return replace(
        spec,
        top_k=min(IDS, spec.vocab_size),
        profile="plain",
        profile_options={},
        temperatures=(1.0,),
    )


def _short_and_long(rows: Sequence[Row], most: int) -> tuple[Row, Row]:
    """Two probes of different lengths, the second the longer one, of at most `most` tokens."""
    repeats = -(-LEAST // len(rows[-1]))
    long = _probe_row(rows[-1], np.tile(rows[-1].input_ids, repeats)[:most])
    shorter = len(rows[0]) if len(rows[0]) < len(long) else len(long) // 2
    return _cut(rows[0], shorter), long


def _partner(short: Row, long: Row, changed: Row, probe: _Probe) -> Row:
    """The shorter row that may share a pass with `long`; a row of its length if there is none."""
    rows = (short, _cut(long, len(long) * 3 // 4), _cut(long, len(long) - 1))
    return next((row for row in rows if probe.regime(row) == probe.regime(long)), changed)


def _probe_row(row: Row, ids: NDArray[np.int32]) -> Row:
    """A row of these tokens, of which up to `POSITIONS` targets are compared."""
    targets = np.linspace(1, len(ids) - 1, min(POSITIONS, len(ids) - 1)).astype(int)
    mask = np.zeros(len(ids), np.uint8)
    mask[targets] = 1
    mask[max(len(ids) // 2 - 2, 1) : len(ids) // 2 + 1] = 1  # before the tokens that are changed
    return Row(row.row, ids, mask)


def _cut(row: Row, length: int) -> Row:
    return _probe_row(row, row.input_ids[: max(length, 2)])


def _middle(row: Row) -> int:
    """The position of the first token that `_changed` changes."""
    return len(row) // 2


def _changed(row: Row, vocab_size: int) -> Row:
    ids = row.input_ids.copy()
    ids[_middle(row) :] = (ids[_middle(row) :] + 1) % vocab_size
    return _probe_row(row, ids)


class _Probe:
    """Run rows through a teacher, and compare the results on all ranks."""

    def __init__(self, config: DumpConfig, teacher: Teacher, spec: StoreSpec) -> None:
        self.layout, self.regime_of = teacher.layout, teacher.regime
        self.forward = teacher.forward(_small(spec), config.rows_per_lm_head)
        self.size = min(config.model.micro_batch_size, 2)
        limit = config.max_tokens_per_micro_batch or sys.maxsize
        self.most = limit if self.size == 1 else max(limit // 2, LEAST)
        kind = config.trainer.dtype_name
        tf32 = self.layout.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        self.tolerance = TF32 if kind == "32" and tf32 else TOLERANCES[kind]
        self.routed = 0.0 if kind == "32" else ROUTED

    def regime(self, row: Row) -> int:
        return self.regime_of(len(row) - 1)

    def __call__(self, *rows: Row) -> list[TopK | None]:
        """Run the rows in one call; return None for those without logits on this rank."""
        results = self.forward(rows, min(len(rows), self.size))
        if results is None:
            return [None] * len(rows)
        return [None if isinstance(one, RowError) else one for one in results]

    def agree(
        self, alone: Mapping[Row, TopK | None], rows: Sequence[Row], found: Sequence[TopK | None]
    ) -> bool:
        """Whether each row has the logits that it has alone."""
        pairs = zip(rows, found, strict=True)
        return not any([self.differs(alone[row], other) for row, other in pairs])

    def differs(self, one: TopK | None, other: TopK | None, count: int | None = None) -> bool:
        """Whether the first `count` of two results of a row differ beyond rounding, on any rank."""
        mine = one is not None and other is not None and self._apart(one, other, count)
        return self.layout.any(mine)

    def _apart(self, one: TopK, other: TopK, count: int | None) -> bool:
        beyond = difference(one, other)[:count] > self.tolerance
        return bool(len(beyond)) and float(beyond.float().mean()) > self.routed


def difference(one: TopK, other: TopK) -> torch.Tensor:
    """Largest difference [A] of the logits and the log-sum-exp, relative to the largest logit.

    An id that the other does not have is at most the other's smallest logit. Positions with a
    non-finite logit in both are equal; what they mean is judged in the dump.
    """
    assert one.logsumexp is not None and other.logsumexp is not None
    same = one.ids[:, :, None] == other.ids[:, None, :]  # [A, K, K]
    apart = (one.logits[:, :, None] - other.logits[:, None, :]).abs()
    apart = torch.where(same, apart, 0).amax((1, 2))
    for a, b, found in ((one, other, same.any(2)), (other, one, same.any(1))):
        beyond = (a.logits - b.logits[:, -1:]).clamp(min=0)
        apart = torch.maximum(apart, torch.where(found, 0, beyond).amax(1))
    apart = torch.maximum(apart, (one.logsumexp - other.logsumexp).abs().amax(1))
    apart = apart / one.logits.abs().amax().clamp(min=1e-30)
    unknown = ~(one.logits.isfinite().all(1) & other.logits.isfinite().all(1))
    return torch.where(unknown, 0, apart)
