"""Forward pass of a Megatron-core teacher, and the top-K logits of its answer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from nemo_kd.mcore.lm_head import gpt_module, in_head_dtype, split_lm_head
from nemo_kd.mcore.multi_token import refuse_multi_token
from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.forward import AnswerHead, LMHead, inputs_of
from nemo_kd.teacher.layout import Layout
from nemo_kd.topk import TopK


class TopKForward(AnswerHead):
    """A `teacher.interface.Forward` on any tensor, pipeline and sequence layout.

    `model` is this stage's GPTModel in its wrappers, as Megatron's schedules take it. Collectives:
    those of the model's forward pass, and of the top-K on the last stage.

    Errors: NemoKDError for a model with MTP layers.
    """

    def __init__(
        self, model: torch.nn.Module, spec: StoreSpec, layout: Layout, rows_per_lm_head: int
    ) -> None:
        super().__init__(spec, layout, rows_per_lm_head)
        self.model, self.device = model, layout.device
        self.gpt = gpt_module(model)
        config = self.gpt.config
        refuse_multi_token(config)
        self.pad_to = 8 * config.tensor_model_parallel_size if config.sequence_parallel else 16

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], micro_batch_size: int) -> list[TopK] | None:
        """Run one pass over `rows`, padded to one length; their number is a multiple of
        `micro_batch_size`.

        Returns the top-K of each row on the last pipeline stage, the same on every tensor-parallel
        rank; None on the other stages.
        """
        length = max(len(row) for row in rows) - 1  # the last token is only a target
        length = -(-length // self.pad_to) * self.pad_to
        starts = range(0, len(rows), micro_batch_size)
        batches = [rows[start : start + micro_batch_size] for start in starts]
        with split_lm_head(self.gpt) as head:
            results = forward_only(
                self.model,
                lambda it, model: self._step(next(it), model, length, head),
                batches,
                length=length,
                micro_batch_size=micro_batch_size,
            )
        return None if head is None else [topk for batch in results for topk in batch]

    def _step(
        self, rows: Sequence[Row], model: torch.nn.Module, length: int, head: LMHead | None
    ) -> tuple[torch.Tensor, object]:
        positions = torch.arange(length).expand(len(rows), -1)
        output = model(
            input_ids=inputs_of(rows, length).to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=None,  # causal, built by the attention itself
            labels=None,
        )
        return output, lambda hidden, non_loss_data: self._topk(hidden, head, rows)

    def _topk(self, hidden: torch.Tensor, head: LMHead | None, rows: Sequence[Row]) -> list[TopK]:
        """Return the top-K of each row's answer tokens; hidden [S, B, H], or this rank's part."""
        assert head is not None  # the schedule calls this on the last stage only
        config = self.gpt.config
        hidden = in_head_dtype(hidden, self.gpt)  # before the gather, which then has half the bytes
        if config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        # Outside the schedule's own autocast; a single context casts the head's weight only once.
        with torch.autocast("cuda", config.autocast_dtype, enabled=config.enable_autocast):
            return list(self.topk(hidden, head, rows))


def forward_only(
    model: torch.nn.Module, step: Any, batches: Sequence[Any], *, length: int, micro_batch_size: int
) -> list[Any]:
    """Run Megatron's schedule without a backward pass.

    `step(iterator over batches, model)` returns the model's output and a function of that output.
    Returns the function's results, one per batch, on the last stage; an empty list on the others.
    """
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return results
