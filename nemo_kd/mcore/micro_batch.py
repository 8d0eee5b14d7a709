"""The loss of one micro-batch, computed in the forward pass of Megatron's model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_kd.data import AnswerTokens
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, sft_kd_loss
from nemo_kd.mcore.metrics import NAMES, OF_THE_TEACHER, MetricSums, token_sums

Report = dict[str, torch.Tensor]
Reduced = tuple[torch.Tensor, torch.Tensor, Report]
"""What Megatron's schedules expect of a loss function: the loss, its divisor and a report."""

TRAINING_TERMS = 3
"""Number of `NAMES` in a training report: the loss and its two terms."""


@dataclass(kw_only=True)
class MicroBatchLoss:
    """loss [B, S] of a micro-batch, on the last pipeline stage.

    `replace_loss_of` gives it to the model, whose output is then `of_own_logits`; `reduced` is the
    loss function for the schedule.
    """

    labels: torch.Tensor
    """[B, S]: of this context-parallel rank, as everything here."""
    answers: AnswerTokens | None
    """None on other pipeline stages, where nothing is computed."""
    config: KDConfig
    vocab_size: int
    training: bool
    """Whether the gradient is written into the memory of the logits."""
    per_token: bool
    """`TransformerConfig.calculate_per_token_loss`."""
    total: int | None = None
    """Answer tokens of the micro-batch on all context-parallel ranks; None: those in `answers`."""
    scheduled: bool = False
    """Whether the temperature is another one than the data set's, whose log-sum-exp is then left
    out."""
    sums: MetricSums | None = None
    """Evaluated micro-batches are added to it."""
    _report: Report | None = field(default=None, init=False)

    def replace_loss_of(self, gpt: Any) -> None:
        """Make the model's next forward pass with labels compute this loss, once.

        The pass may come later: a schedule plan of Megatron's runs it layer by layer, beside the
        backward pass of another micro-batch.
        """

        def once(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            del gpt.compute_language_model_loss  # of this instance: the class has Megatron's
            return self.of_own_logits(labels, logits)

        gpt.compute_language_model_loss = once

    def of_own_logits(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss [B, S] float32, zero outside answers.

        labels [B, S]; logits [S, B, Vp] of the output layer, in its dtype. Collectives: two
        all-reduces over the tensor-parallel ranks forward, none backward.
        """
        assert self.answers is not None  # on the last stage
        topk = self.answers.topk
        if self.scheduled and self.config.temperature not in topk.temperatures:
            topk = replace(topk, logsumexp=None)
        result = sft_kd_loss(
            logits,
            labels.t(),
            topk,
            self.config,
            weights=self.answers.weights(self.config.weights),
            group=parallel_state.get_tensor_model_parallel_group(),
            vocab_size=self.vocab_size,
            positions=self.answers.positions,
            inplace=self.training,
        )
        if self.sums is not None and not self.training:
            self.sums.add(result)
        terms = token_sums(result).float()[:, : TRAINING_TERMS if self.training else None]
        report = dict(zip(NAMES, terms.unbind(1), strict=False))
        if topk.logsumexp is None:
            report = {name: term for name, term in report.items() if name not in OF_THE_TEACHER}
        self._report = report
        return result.loss.t().contiguous()

    def of_logits(self, logits: torch.Tensor) -> Reduced:
        """Return `reduced` of logits [B, S, Vp], as the model returns them without labels."""
        return self.reduced(self.of_own_logits(self.labels, logits.transpose(0, 1)))

    def reduced(self, losses: torch.Tensor) -> Reduced:
        """Return (loss, divisor, report) of the model's output, losses [B, S].

        With `calculate_per_token_loss`: Σ over this context-parallel rank's answer tokens, and
        their number, by whose sum over the global batch Megatron divides. Without: C · Σ, and the
        number N of the micro-batch on all C context-parallel ranks, at least 1, since Megatron's
        DDP averages Σ / N over these ranks too:

            1/C · Σ_ranks (C · Σ_rank / N) = Σ / N

        Each term of the report is [Σ, number] over this rank's answer tokens, float32, of which
        Megatron-LM and Megatron-Bridge log the quotient of their sums over micro-batches and ranks:
        `loss`, `sft_loss` and `kd_loss`, and in evaluation the other metrics of `MetricSums`.

        Errors: NemoKDError if the model has not computed this loss.
        """
        if self._report is None:
            raise NemoKDError(
                "the model's forward pass did not call compute_language_model_loss, which the "
                "distillation replaces; set what fuses its LM head with the cross-entropy to False"
            )
        assert self.answers is not None
        number, factor = len(self.answers.positions), 1
        if not self.per_token:
            factor = parallel_state.get_context_parallel_world_size()
            number = max(self._total(number, factor), 1)
        divisor = torch.full((), number, dtype=torch.int, device=losses.device)
        return losses.sum() * factor, divisor, self._report

    def _total(self, own: int, ranks: int) -> int:
        if self.total is None and ranks > 1:
            raise NemoKDError(
                "the batch has no answer_tokens, their number on all context-parallel ranks, which "
                "context parallelism needs without calculate_per_token_loss; take batches of "
                "KDDataset.collate_fn, or set TransformerConfig.calculate_per_token_loss=True"
            )
        return own if self.total is None else self.total
