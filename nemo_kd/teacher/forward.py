"""Framework-independent steps from a model's hidden states to the top-K of answer tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from nemo_kd.sft import RowError, RowFile
from nemo_kd.sft.rows import BadRows, Row, errors_name
from nemo_kd.store import Sample, StoreSpec
from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.select import Selection, joined
from nemo_kd.topk import TopK

LMHead = Callable[[torch.Tensor], torch.Tensor]
"""Function from hidden states [N, H] to this rank's logits [N, Vp]."""


class NoLogitsError(RowError):
    """Error for a row whose logits define no distribution: NaN, +inf, or all -inf."""


class NoAnswerOfServerError(RowError):
    """Error for a row about which an inference server says nothing that can be used."""


def usable(
    pairs: Iterable[tuple[Row, TopK | RowError]],
    file: RowFile,
    bad: BadRows,
    dropped: list[RowError],
    samples_per_row: int = 1,
) -> Iterator[tuple[Row, TopK]]:
    """Yield the rows with valid logits.

    Errors of rows that `bad` drops are appended to `dropped`; for any other invalid row, its
    RowError is raised, a NoLogitsError for invalid logits.
    """
    for row, topk in pairs:
        with bad.skipped(dropped):
            with errors_name(file, row.row // samples_per_row):
                topk = _valid(topk)
            yield row, topk


def _valid(topk: TopK | RowError) -> TopK:
    """Raise a given error; NoLogitsError if a token has NaN logits, or no finite largest logit or
    log-sum-exp."""
    if isinstance(topk, RowError):
        raise topk
    finite = topk.logits[:, 0].isfinite() & ~topk.logits.isnan().any(1)
    finite &= topk.logsumexp.isfinite().all(1)
    if not finite.all():
        raise NoLogitsError(
            f"the teacher's logits at answer token {int((~finite).nonzero()[0, 0])} are not "
            "a distribution (NaN, +inf, or all -inf); check the checkpoint and trainer.precision, "
            "or set on_bad_row=drop to skip such rows"
        )
    return topk


def sample_of(row: Row, topk: TopK) -> Sample:
    """Combine a row and its top-K tensors into a store sample of numpy arrays."""
    arrays = topk.map(torch.Tensor.numpy)
    return Sample(row.row, row.input_ids, row.loss_mask, arrays)


def inputs_of(rows: Sequence[Row], length: int) -> torch.Tensor:
    """Return input tokens [B, length] int64, right-padded with zeros.

    The last token of a row is omitted: it is only a target.
    """
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row) - 1] = torch.from_numpy(row.input_ids[:-1].astype("int64"))
    return tokens


class AnswerHead:
    """Compute the top-K of answer tokens from a model's final hidden states and its LM head.

    Only answer positions reach the LM head, `rows_per_lm_head` at a time, so that no tensor is
    larger than `[rows_per_lm_head, V/TP]`. Collectives: `Selection`'s over the tensor-parallel
    group.
    """

    def __init__(self, spec: StoreSpec, layout: Layout, rows_per_lm_head: int) -> None:
        self.select = Selection(spec, layout.tensor_group)
        self.rows_per_lm_head = rows_per_lm_head

    def topk(self, hidden: torch.Tensor, head: LMHead, rows: Sequence[Row]) -> Iterator[TopK]:
        """Yield, for each of the B rows of hidden [S, B, H], the top-K of its A answer tokens.

        It is on the CPU: ids and logits [A, K], log-sum-exp [A, T].
        """
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
        topk, start = joined(chunks), 0
        for target in targets:
            yield topk[start : start + len(target)]
            start += len(target)
