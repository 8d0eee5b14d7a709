"""The student's loss in the place of Megatron's, on the last pipeline stage, where the logits are.

Set before a forward pass: the step's settings, the micro-batch's teacher, and where metrics go.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from nemo_kd.data import TeacherSelection
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDLoss, linear_sft_kd_loss, sft_kd_loss
from nemo_kd.mcore.lm_head import split_lm_head
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.nemo.metrics import MetricSums
from nemo_kd.topk import TopK


class StudentLoss:
    """loss [B, S] of a micro-batch, vocabulary-parallel over the tensor-parallel group.

    `vocab_size` is the tokenizer's, `padding` how many columns the model has beyond it;
    `logit_softcap` is the model's, for the LM head that is fused with the loss.
    """

    def __init__(
        self,
        schedule: KDTrainingConfig,
        vocab_size: int,
        padding: int,
        logit_softcap: float | None = None,
    ) -> None:
        self.schedule = schedule
        self.vocab_size, self.padding, self.logit_softcap = vocab_size, padding, logit_softcap
        self.kd = schedule.at(0, 1)
        self.teacher: TeacherSelection | None = None
        self.sums = MetricSums()
        self.forward_only = False

    def attach(self, gpt: GPTModel, fused_lm_head: bool) -> None:
        """Replace the loss of this stage's GPTModel, or its forward pass to fuse the LM head."""
        self._gpt = gpt
        self._gpt_forward, self._cross_entropy = gpt.forward, gpt.compute_language_model_loss
        gpt.compute_language_model_loss = self.of_logits
        if fused_lm_head:
            gpt.forward = self.fused_forward

    def of_logits(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [B, S], logits [S, B, Vp] → loss [B, S], zero outside the answers.

        Two small all-reduces forward, none backward.
        """
        teacher, self.teacher = self.teacher, None
        if teacher is None:
            return self._without_teacher(labels, logits)
        if self._is_plain_sft(teacher):
            with torch.no_grad():
                self.sums.add(self._sft_kd(labels, logits.detach(), teacher, inplace=False))
            return self.kd.weights[0] * self._cross_entropy(labels, logits)
        result = self._sft_kd(labels, logits, teacher, inplace=True)
        self.sums.add(result)
        return result.loss.t().contiguous()

    def fused_forward(
        self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The GPTModel's forward, its LM head and loss in one where there are teacher rows."""
        if labels is None or self.teacher is None:
            return self._gpt_forward(*args, labels=labels, **kwargs)
        teacher, self.teacher = self.teacher, None
        gpt = self._gpt
        with split_lm_head(gpt):
            hidden = self._gpt_forward(*args, labels=None, **kwargs)  # [S, B, H], or [S/TP, B, H]
        tied = gpt.share_embeddings_and_output_weights
        result = linear_sft_kd_loss(
            hidden,
            gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight,
            labels.t(),
            **self._objective(teacher),
            sequence_parallel=gpt.config.sequence_parallel,
            logit_softcap=self.logit_softcap,
        )
        self.sums.add(result)
        return result.loss.t().contiguous()

    def _sft_kd(
        self, labels: torch.Tensor, logits: torch.Tensor, teacher: TeacherSelection, inplace: bool
    ) -> KDLoss:
        return sft_kd_loss(logits, labels.t(), **self._objective(teacher), inplace=inplace)

    def _objective(self, teacher: TeacherSelection) -> dict[str, Any]:
        """What the loss of logits and that of hidden states are given alike."""
        return {
            "teacher": self._at_temperature(teacher),
            "config": self.kd,
            "weights": teacher.weights(self.kd.weights),
            "group": parallel_state.get_tensor_model_parallel_group(),
            "vocab_size": self.vocab_size,
            "mask": teacher.mask,
        }

    def _at_temperature(self, teacher: TeacherSelection) -> TopK:
        """The data sets' log-sum-exp is at the schedule's first temperature; others are unknown."""
        topk = replace(teacher.topk, temperatures=(self.schedule.temperature,))
        if self.kd.temperature == self.schedule.temperature:
            return topk
        return replace(topk, logsumexp=None)

    def _without_teacher(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.schedule.distils and not self.forward_only:
            raise NemoKDError(
                "the weight of the distillation is above 0, but this training batch has no "
                "teacher rows: give model.data.train_ds.store, or set model.kd.alpha=0"
            )
        return self._cross_entropy(labels, logits)

    def _is_plain_sft(self, teacher: TeacherSelection) -> bool:
        """Without a KD term Megatron's own cross-entropy trains: NeMo's SFT bit for bit."""
        nemos_softmax = self.schedule.count_padding or not self.padding
        return not self.kd.weights[1] and teacher.alpha is None and nemos_softmax
