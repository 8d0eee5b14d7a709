"""Replace Megatron's loss with the distillation loss, on the last pipeline stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from nemo_kd.data import AnswerTokens
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDLoss, linear_sft_kd_loss, sft_kd_loss
from nemo_kd.mcore.lm_head import split_lm_head
from nemo_kd.mcore.metrics import MetricSums
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.topk import TopK


class StudentLoss:
    """Loss [B, S] of a micro-batch, vocabulary-parallel over the tensor-parallel group.

    NeMo's forward pass gives the loss only labels and logits. Therefore `begin` sets a step's
    settings and sums, and `hand_over` the answer tokens of the next micro-batch, used once.

    `vocab_size` is the tokenizer's, `padding` the number of further columns in the model;
    `logit_softcap` is the model's, for the LM head that is fused with the loss.
    """

    def __init__(
        self,
        schedule: KDTrainingConfig,
        vocab_size: int,
        padding: int,
        logit_softcap: float | None = None,
    ) -> None:
        self._schedule = schedule
        self._vocab_size, self._padding, self._softcap = vocab_size, padding, logit_softcap
        self._kd, self._sums, self._training = schedule.at(0, 1), MetricSums(), True
        self._answers: AnswerTokens | None = None

    def begin(self, kd: KDTrainingConfig, sums: MetricSums, *, training: bool) -> None:
        """Set the settings of the following micro-batches, and where their metrics are summed."""
        self._kd, self._sums, self._training = kd, sums, training

    def hand_over(self, answers: AnswerTokens | None) -> None:
        """Set the answer tokens of the next micro-batch; None if it has no teacher."""
        self._answers = answers

    def attach(self, gpt: GPTModel, fused_lm_head: bool) -> None:
        """Replace the loss of this stage's GPTModel, or its forward pass to fuse the LM head."""
        self._gpt = gpt
        self._gpt_forward, self._cross_entropy = gpt.forward, gpt.compute_language_model_loss
        gpt.compute_language_model_loss = self.of_logits
        if fused_lm_head:
            gpt.forward = self.fused_forward

    def of_logits(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Compute the loss [B, S], zero outside answers, of labels [B, S] and logits [S, B, Vp].

        Two small all-reduces forward, none backward; does not synchronize with the device.
        """
        answers, self._answers = self._answers, None
        if answers is None:
            return self._without_teacher(labels, logits)
        if self._is_plain_sft(answers):
            with torch.no_grad():
                self._sums.add(self._sft_kd(labels, logits.detach(), answers, inplace=False))
            return self._kd.weights[0] * self._cross_entropy(labels, logits)
        return self._added(self._sft_kd(labels, logits, answers, inplace=True))

    def fused_forward(
        self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Run the GPTModel's forward pass, with LM head and loss fused if there is a teacher."""
        if labels is None or self._answers is None:
            return self._gpt_forward(*args, labels=labels, **kwargs)
        answers, self._answers = self._answers, None
        gpt = self._gpt
        with split_lm_head(gpt):
            hidden = self._gpt_forward(*args, labels=None, **kwargs)  # [S, B, H], or [S/TP, B, H]
        _run_pre_hooks(gpt.output_layer)
        tied = gpt.share_embeddings_and_output_weights
        return self._added(
            linear_sft_kd_loss(
                hidden,
                gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight,
                labels.t(),
                **self._objective(answers),
                sequence_parallel=gpt.config.sequence_parallel,
                logit_softcap=self._softcap,
                equal_gradients=True,  # NeMo divides the sum over answer tokens by one number
            )
        )

    def _sft_kd(
        self, labels: torch.Tensor, logits: torch.Tensor, answers: AnswerTokens, inplace: bool
    ) -> KDLoss:
        return sft_kd_loss(logits, labels.t(), **self._objective(answers), inplace=inplace)

    def _objective(self, answers: AnswerTokens) -> dict[str, Any]:
        """Return the arguments common to the loss of logits and the fused loss."""
        return {
            "teacher": self._teacher(answers.topk),
            "config": self._kd,
            "weights": answers.weights(self._kd.weights),
            "group": parallel_state.get_tensor_model_parallel_group(),
            "vocab_size": self._vocab_size,
            "positions": answers.positions,
        }

    def _teacher(self, topk: TopK) -> TopK:
        """Return the teacher's rows for the step's temperature.

        Data sets have the log-sum-exp at the schedule's first temperature; at others it is unknown.
        `check_schedule` has checked sampled stores, with each store's own weight.
        """
        known = self._kd.temperature == self._schedule.temperature
        return replace(topk, logsumexp=topk.logsumexp if known else None, draws=False)

    def _added(self, result: KDLoss) -> torch.Tensor:
        """Add the metrics to the sums; transpose the loss [S, B] to NeMo's [B, S]."""
        self._sums.add(result)
        return result.loss.t().contiguous()

    def _without_teacher(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self._schedule.distils and self._training:
            raise NemoKDError(
                "the weight of the distillation is above 0, but this training batch has no "
                "teacher rows: give model.data.train_ds.store, or set model.kd.alpha=0"
            )
        return self._cross_entropy(labels, logits)

    def _is_plain_sft(self, answers: AnswerTokens) -> bool:
        """Whether to train with Megatron's cross-entropy, which equals NeMo's SFT bit for bit."""
        nemos_softmax = self._schedule.count_padding or not self._padding
        return not self._kd.weights[1] and answers.alpha is None and nemos_softmax


def _run_pre_hooks(module: torch.nn.Module) -> None:
    """Run what precedes a forward pass of `module`, whose weight is used without one.

    With `model.optim.overlap_param_sync` Megatron's DDP waits there for the all-gather of the
    module's weights, and starts the next one.
    """
    for hook in list(module._forward_pre_hooks.values()):
        hook(module, ())
