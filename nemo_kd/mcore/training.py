"""Train on a store in Megatron-core's own training loop, without NeMo.

`kd_forward_step` is the function that Megatron's schedules call for each micro-batch of
`StoreBatches`. Megatron-LM and Megatron-Bridge train through the same schedules; their own forward
steps can return the loss function of a `StepLoss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_model_config

from nemo_kd.data.learnable import FIELD, Naming, StoreFacts, check_stores
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, KDSchedule
from nemo_kd.loss.schedule import evaluation_config, training_config
from nemo_kd.mcore.cuda_graphs import refuse_full_iteration
from nemo_kd.mcore.dataset import Batch
from nemo_kd.mcore.device import on_device
from nemo_kd.mcore.lm_head import gpt_module
from nemo_kd.mcore.metrics import MetricSums
from nemo_kd.mcore.micro_batch import MicroBatchLoss, Reduced
from nemo_kd.mcore.multi_token import refuse_multi_token

LossFunction = Callable[[torch.Tensor], Reduced]
ForwardStep = Callable[..., tuple[Any, LossFunction]]
Progress = Callable[[], tuple[int, int]]
"""Returns the current step, from 0, and the number of training steps."""


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
        The function maps logits [B, S, Vp], of this tensor- and context-parallel rank, to (loss,
        divisor, report): see `MicroBatchLoss.reduced`. In training it writes the gradient into
        their memory.

        Errors: NemoKDError for a model with MTP layers or whose logits are gathered from the
        tensor-parallel ranks, for CUDA graphs of full iterations, for sequences beyond the
        `token_limit` of `gpt.build`, for stores of another vocabulary, and for those that
        `KDDataset.check` refuses.
        """
        return self.micro_batch(batch, model).of_logits

    def micro_batch(self, batch: Batch, model: Any) -> MicroBatchLoss:
        """Return the loss of a micro-batch, to be computed in the model; as `__call__`."""
        self._check(batch, model)
        training = model.training and torch.is_grad_enabled()
        self._check_stores(batch.get("stores", ()), training)
        config = self._at(training)
        return MicroBatchLoss(
            labels=batch["labels"],
            answers=batch["answers"],
            config=config,
            vocab_size=self.vocab_size,
            training=training,
            per_token=get_model_config(model).calculate_per_token_loss,
            total=batch.get("answer_tokens"),
            scheduled=config.temperature != self.config.temperature,
            sums=self.sums,
        )

    def _check(self, batch: Batch, model: Any) -> None:
        refuse_multi_token(get_model_config(model))
        refuse_full_iteration(get_model_config(model))
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
    loss by the number of answer tokens: with `TransformerConfig.calculate_per_token_loss` those of
    the global batch, else those of the micro-batch on all its context-parallel ranks.

    The loss is computed in the model's forward pass, of the logits that its output layer returns:
    Megatron neither transposes them nor casts them to float32.

    Supports tensor, pipeline, sequence, expert and data parallelism, and context parallelism if the
    model's attention does. Under a virtual pipeline each chunk of the model needs its own
    `StoreBatches`. Arguments and errors as in `StepLoss`.
    """
    loss = StepLoss(config, vocab_size, progress=progress, sums=sums, naming=naming)

    def step(
        iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, LossFunction]:
        batch, gpt = next(iterator), gpt_module(model)
        last = getattr(gpt, "post_process", True)
        if not last:
            batch = {**batch, "answers": None}
        batch = {name: on_device(value) for name, value in batch.items()}
        micro_batch = loss.micro_batch(batch, model)  # checks the model before its forward pass
        if last:
            micro_batch.replace_loss_of(gpt)
        forward = model.build_schedule_plan if return_schedule_plan else model
        return forward(**model_inputs(batch), labels=batch["labels"]), micro_batch.reduced

    return step


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments of a `GPTModel` for a micro-batch, without labels."""
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
