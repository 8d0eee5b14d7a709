"""Train on a store in Megatron-core's own training loop, without NeMo.

`kd_forward_step` is the function that Megatron's schedules call for each micro-batch of
`StoreBatches`. Megatron-LM and Megatron-Bridge train through the same schedules; their own forward
steps can return the loss function of a `StepLoss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_model_config

from nemo_kd.data import AnswerTokens
from nemo_kd.data.learnable import FIELD, Naming, StoreFacts, check_stores
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, KDSchedule, sft_kd_loss
from nemo_kd.loss.schedule import evaluation_config, training_config
from nemo_kd.mcore.dataset import Batch
from nemo_kd.mcore.device import on_device
from nemo_kd.mcore.lm_head import gpt_module
from nemo_kd.mcore.metrics import NAMES, OF_THE_TEACHER, MetricSums, token_sums
from nemo_kd.mcore.multi_token import refuse_multi_token

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
ForwardStep = Callable[..., tuple[Any, LossFunction]]
Progress = Callable[[], tuple[int, int]]
"""Returns the current step, from 0, and the number of training steps."""

TRAINING_TERMS = 3
"""Number of `NAMES` in a training report: the loss and its two terms."""


class StepLoss:
    """The loss of micro-batches, at the settings of the current step.

    In training those of `config` at `progress()`; in evaluation those of the schedule's end, so
    that values are comparable within a run. `sums`: evaluated micro-batches are added to it.
    `naming`: how messages name a field of `config`.

    An evaluation's data set has the schedule's last temperature, `config.end.temperature`. With the
    log-sum-exp at another one the teacher's mass and entropy are not known, and not reported.

    Errors: NemoKDError for a schedule without `progress`.
    """

    def __init__(
        self,
        config: KDConfig,
        vocab_size: int,
        *,
        progress: Progress | None = None,
        sums: MetricSums | None = None,
        naming: Naming = FIELD,
    ) -> None:
        self.naming = naming
        self._accepted: dict[bool, tuple[StoreFacts, ...]] = {}
        self.config, self.vocab_size, self.sums = config, vocab_size, sums
        self.progress = progress
        if isinstance(config, KDSchedule) and config.scheduled and progress is None:
            raise NemoKDError(
                "alpha_end or temperature_end is set, but the step is not known: pass progress, a "
                "function that returns the current step and the number of training steps"
            )

    def __call__(self, batch: Batch, model: Any) -> LossFunction:
        """Return the loss function of a micro-batch whose tensors are on the logits' device.

        `model`, in its wrappers, is evaluated if it is in eval mode or no gradient is recorded.
        The function maps logits [B, S, Vp], of this tensor- and context-parallel rank, to (Σ loss
        over the micro-batch's answer tokens, their number, a report). Each term of the report is
        [Σ, number] over the answer tokens, float32, of which Megatron-LM and Megatron-Bridge log
        the quotient of their sums over micro-batches and ranks: `loss`, `sft_loss` and `kd_loss`,
        and in evaluation the other metrics of `MetricSums`.

        Errors: NemoKDError for a model with MTP layers or whose logits are gathered from the
        tensor-parallel ranks, for sequences beyond the `token_limit` of `gpt.build`, for stores of
        another vocabulary, and for those that `KDDataset.check` refuses.
        """
        self._check(batch, model)
        training = model.training and torch.is_grad_enabled()
        self._check_stores(batch.get("stores", ()), training)
        # Megatron guards a total of 0 tokens over the global batch, not that of a micro-batch.
        fewest = 0 if get_model_config(model).calculate_per_token_loss else 1
        config = self._at(training)
        return partial(self._loss, batch["labels"], batch["answers"], config, training, fewest)

    def _check(self, batch: Batch, model: Any) -> None:
        refuse_multi_token(get_model_config(model))
        stored = batch.get("vocab_size")
        if stored not in (None, self.vocab_size):
            raise NemoKDError(
                f"vocab_size={self.vocab_size} of the loss, but the stores' vocabulary has "
                f"{stored} ids: pass vocab_size=store.spec.vocab_size"
            )
        sharded = getattr(gpt_module(model), "parallel_output", True)
        if not sharded and parallel_state.get_tensor_model_parallel_world_size() > 1:
            raise NemoKDError(
                "the model gathers its logits from the tensor-parallel ranks: build it with "
                "parallel_output=True"
            )

        _check_length(batch, gpt_module(model))

    def _check_stores(self, stores: tuple[StoreFacts, ...], training: bool) -> None:
        if self._accepted.get(training) == stores:
            return
        check_stores(stores, self.config, training=training, naming=self.naming)
        self._accepted[training] = stores

    def _at(self, training: bool) -> KDConfig:
        if not training:
            return evaluation_config(self.config)
        return training_config(self.config, *self.progress()) if self.progress else self.config

    def _loss(
        self,
        labels: torch.Tensor,
        answers: AnswerTokens,
        config: KDConfig,
        training: bool,
        fewest: int,
        logits: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        topk = answers.topk
        scheduled = config.temperature != self.config.temperature
        if scheduled and config.temperature not in topk.temperatures:
            topk = replace(topk, logsumexp=None)
        result = sft_kd_loss(
            logits.transpose(0, 1),
            labels.t(),
            topk,
            config,
            weights=answers.weights(config.weights),
            group=parallel_state.get_tensor_model_parallel_group(),
            vocab_size=self.vocab_size,
            positions=answers.positions,
            inplace=training,
        )
        if self.sums is not None and not training:
            self.sums.add(result)
        terms = token_sums(result).float()[:, : TRAINING_TERMS if training else None]
        report = dict(zip(NAMES, terms.unbind(1), strict=False))
        if topk.logsumexp is None:
            report = {name: term for name, term in report.items() if name not in OF_THE_TEACHER}
        number = max(len(answers.positions), fewest)
        divisor = torch.full((), number, dtype=torch.int, device=logits.device)
        return result.loss.sum(), divisor, report


def _check_length(batch: Batch, gpt: Any) -> None:
    """Raise NemoKDError for sequences on which the model computes other than its config.json."""
    limit = getattr(gpt, "token_limit", None)  # of `gpt.build`
    if limit is None:
        return
    longest, reason = limit
    length = batch.get("longest")  # of packs: each of their sequences begins at position 0
    what = f"a packed sequence of {length} tokens"
    if length is None:
        length = batch["labels"].shape[1] * parallel_state.get_context_parallel_world_size()
        what = f"seq_length={length}"
    if length > longest:
        raise NemoKDError(
            f"{what}: beyond {longest} tokens {reason}, which Megatron-core does not do here, so "
            "that the student would be trained as another model than its config.json describes; "
            f"use sequences of {longest} tokens or less"
        )


def kd_forward_step(
    config: KDConfig,
    vocab_size: int,
    *,
    progress: Progress | None = None,
    sums: MetricSums | None = None,
    naming: Naming = FIELD,
) -> ForwardStep:
    """Return a `forward_step_func` for Megatron's schedules that trains or evaluates a `GPTModel`.

    It evaluates if the model is in eval mode or no gradient is recorded. The schedule divides the
    loss by the number of answer tokens: of the global batch with
    `TransformerConfig.calculate_per_token_loss`, else those of the micro-batch on this
    context-parallel rank. Supports tensor, pipeline, sequence, expert and data parallelism, and
    context parallelism if the model's attention does. Under a virtual pipeline each chunk of the
    model needs its own `StoreBatches`. Arguments as in `StepLoss`.
    """
    loss = StepLoss(config, vocab_size, progress=progress, sums=sums, naming=naming)

    def step(
        iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, LossFunction]:
        batch = {name: on_device(value) for name, value in next(iterator).items()}
        function = loss(batch, model)  # checks the model before its forward pass
        forward = model.build_schedule_plan if return_schedule_plan else model
        return forward(**model_inputs(batch)), function

    return step


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments of a `GPTModel` for a micro-batch, without labels: it returns logits."""
    inputs = {
        "input_ids": batch["tokens"],
        "position_ids": batch["position_ids"],
        "attention_mask": None,  # causal, built by the attention itself
    }
    if "cu_seqlens" in batch:
        ends, longest = batch["cu_seqlens"], batch["max_seqlen"]
        inputs["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    return inputs
