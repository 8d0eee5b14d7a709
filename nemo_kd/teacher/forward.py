"""From hidden states to the top-K logits of answer tokens, whatever framework the model is of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core import parallel_state

from nemo_kd.sft import RowError
from nemo_kd.sft.rows import BadRows, Row
from nemo_kd.store import Sample, StoreSpec
from nemo_kd.store.codecs import Sampled
from nemo_kd.teacher.select import Selection
from nemo_kd.topk import TopK

LMHead = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [N, H] → logits [N, Vp] of this rank."""


class AnswerTopK(NamedTuple):
    """The teacher at the A answer tokens of one row, on the CPU."""

    logits: torch.Tensor  # [A, K] float32
    ids: torch.Tensor  # [A, K] int64
    logsumexp: torch.Tensor  # [A, temperatures] float32


class NoLogitsError(RowError):
    """A row for which the teacher's logits are no distribution: NaN, +inf, or all of them -inf."""


def split_unusable(
    pairs: Iterable[tuple[Row, AnswerTopK]], path: Path, bad: BadRows, samples_per_row: int = 1
) -> tuple[list[tuple[Row, AnswerTopK]], list[RowError]]:
    """The rows with a teacher that a store can hold, and the errors of those left out.

    Errors: NoLogitsError for one that `bad` does not leave out.
    """
    kept, dropped = [], list[RowError]()
    for row, topk in pairs:
        token = _first_unusable(topk)
        if token is None:
            kept.append((row, topk))
            continue
        error = NoLogitsError(
            f"{path}, row {row.row // samples_per_row}: the teacher's logits at answer token "
            f"{token} are no distribution (NaN, +inf, or all -inf); check the checkpoint and "
            "trainer.precision, or leave such rows out with on_bad_row=drop"
        )
        if not bad.drops(error):
            raise error
        dropped.append(error)
    return kept, dropped


def _first_unusable(topk: AnswerTopK) -> int | None:
    """The first answer token that has no largest logit, or no log-sum-exp."""
    usable = topk.logits[:, 0].isfinite() & ~topk.logits.isnan().any(1)
    usable &= topk.logsumexp.isfinite().all(1)
    return None if bool(usable.all()) else int((~usable).nonzero()[0, 0])


def sample_of(row: Row, topk: AnswerTopK, spec: StoreSpec) -> Sample:
    """The entry of a store of `spec` for a row."""
    of_row = TopK(
        ids=topk.ids.numpy(),
        logits=topk.logits.float().numpy(),
        logsumexp=topk.logsumexp.numpy(),
        temperatures=spec.temperatures,
        draws=spec.profile == Sampled.name,
    )
    return Sample(row.row, row.input_ids, row.loss_mask, of_row)


def inputs_of(rows: Sequence[Row], length: int) -> torch.Tensor:
    """[B, length] int64: the rows but for their last tokens, which are only targets, then zeros."""
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row) - 1] = torch.from_numpy(row.input_ids[:-1].astype("int64"))
    return tokens


class AnswerHead:
    """Hidden states in, what the store keeps of answer tokens out, whatever the model is.

    Only answer positions reach the LM head, `rows_per_lm_head` at a time: no tensor is larger
    than `[rows_per_lm_head, V/TP]`. Collectives: `Selection`'s over the tensor-parallel group.
    """

    def __init__(self, spec: StoreSpec, rows_per_lm_head: int) -> None:
        self.select = Selection(spec, parallel_state.get_tensor_model_parallel_group())
        self.rows_per_lm_head = rows_per_lm_head

    def topk(self, hidden: torch.Tensor, head: LMHead, rows: Sequence[Row]) -> Iterator[AnswerTopK]:
        """hidden [S, B, H] → the top-K of the answer tokens of each of the B rows."""
        targets = [torch.from_numpy(row.loss_mask[1:].nonzero()[0]) for row in rows]
        answers = torch.cat([hidden[target, b] for b, target in enumerate(targets)])  # [N, H]
        chunks = [
            self.select(head(part), uniform)  # of logits [n, Vp]
            for part, uniform in zip(
                answers.split(self.rows_per_lm_head),
                self.select.uniform(rows).split(self.rows_per_lm_head),
                strict=True,
            )
        ]
        logits, ids, logsumexp = (torch.cat(parts).cpu() for parts in zip(*chunks, strict=True))
        sizes = [len(target) for target in targets]
        for parts in zip(
            logits.split(sizes), ids.split(sizes), logsumexp.split(sizes), strict=True
        ):
            yield AnswerTopK(*parts)
