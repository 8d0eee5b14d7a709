"""A Megatron-core teacher: Megatron's schedule, then the top-K of answer positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from nemo_kd.mcore.lm_head import LMHead, gpt_module, split_lm_head
from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.forward import AnswerHead, AnswerTopK, inputs_of


class TopKForward(AnswerHead):
    """Rows in, their answer tokens' top-K out, on any tensor, pipeline and sequence layout.

    Collectives: those of the model's own forward, and of the top-K on the last stage.
    """

    def __init__(
        self,
        model: Any,
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
