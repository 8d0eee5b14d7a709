"""The teacher's forward pass: Megatron's schedule, then top-K of answer positions at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from nemo_kd.megatron import LMHead, gpt_module, split_lm_head
from nemo_kd.sft import RowError
from nemo_kd.store import Sample, StoreSpec
from nemo_kd.teacher.rows import BadRows, Row
from nemo_kd.teacher.select import Selection

if TYPE_CHECKING:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )


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


def sample_of(row: Row, topk: AnswerTopK) -> Sample:
    """What the store holds of a row."""
    return Sample(
        row=row.row,
        input_ids=row.input_ids,
        loss_mask=row.loss_mask,
        topk_ids=topk.ids.numpy(),
        topk_logits=topk.logits.float().numpy(),
        logsumexp=topk.logsumexp.numpy(),
    )


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


class TopKForward(AnswerHead):
    """Rows in, their answer tokens' top-K out, on any tensor, pipeline and sequence layout.

    Collectives: those of the model's own forward, and of the top-K on the last stage.
    """

    def __init__(
        self,
        model: MegatronGPTSFTModel,
        spec: StoreSpec,
        rows_per_lm_head: int,
    ) -> None:
        super().__init__(spec, rows_per_lm_head)
        self.model = model
        self.gpt = gpt_module(model)
        tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        self.pad_to = 8 * tensor_size if self.gpt.config.sequence_parallel else 16

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], micro_batch_size: int) -> list[AnswerTopK] | None:
        """One pass over `rows` (a multiple of `micro_batch_size`), padded to one length.

        Returns the top-K of each row on the last pipeline stage, the same on every
        tensor-parallel rank; None on the other stages.
        """
        length = max(len(row) for row in rows) - 1  # the last token is only a target
        length = -(-length // self.pad_to) * self.pad_to
        batches = [
            rows[start : start + micro_batch_size]
            for start in range(0, len(rows), micro_batch_size)
        ]
        with split_lm_head(self.gpt) as head:
            results = get_forward_backward_func()(
                forward_step_func=lambda it, model: self._step(next(it), model, length, head),
                data_iterator=iter(batches),
                model=self.model.model,
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if not parallel_state.is_pipeline_last_stage():
            return None
        return [topk for micro_batch in results for topk in micro_batch]

    def _step(
        self, rows: Sequence[Row], model: torch.nn.Module, length: int, head: LMHead | None
    ) -> tuple[torch.Tensor, object]:
        device = torch.cuda.current_device()
        positions = torch.arange(length).expand(len(rows), -1)
        output = model(
            input_ids=inputs_of(rows, length).to(device),
            position_ids=positions.to(device),
            attention_mask=None,  # causal, built by the attention itself
            labels=None,
        )
        return output, lambda hidden, non_loss_data: self._topk(hidden, head, rows)

    def _topk(
        self, hidden: torch.Tensor, head: LMHead | None, rows: Sequence[Row]
    ) -> list[AnswerTopK]:
        """hidden [S, B, H] (or this rank's part of S) → the top-K of each row's answer tokens."""
        assert head is not None  # the schedule calls this on the last stage only
        config = self.gpt.config
        if config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        # The schedule calls this outside its own autocast; one context casts the head once.
        with torch.autocast("cuda", config.autocast_dtype, enabled=config.enable_autocast):
            return list(self.topk(hidden, head, rows))
