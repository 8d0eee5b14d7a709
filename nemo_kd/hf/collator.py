"""Batches of a store's samples for trainers of transformers' kind, and the loss of such a batch.

A batch is a dictionary of tensors whose first dimension is B, and of integers only: it may be
moved, sliced, concatenated and cast like any other batch, and the teacher's rows stay exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_kd.data import joined, teacher_of
from nemo_kd.errors import NemoKDError
from nemo_kd.hf.dataset import StoreDataset
from nemo_kd.loss import KDConfig, KDLoss, sft_kd_loss
from nemo_kd.loss.objective import checked_teacher
from nemo_kd.loss.schedule import KDSchedule
from nemo_kd.store import Sample
from nemo_kd.topk import ABSENT_ID, TopK

IGNORED = -100
"""Label of a token that is not learned: torch's and transformers' `ignore_index`."""
TEACHER = "teacher"
"""Key of the teacher's rows in a batch; the model must not get it."""


class StoreCollator:
    """Collate B items of a `StoreDataset`, and compute their loss from a model's logits.

    A batch has, all padded on the right:

    - `input_ids`, `attention_mask` [B, S] int64;
    - `labels` [B, S] int64: the token itself where it is an answer token, else -100. The loss
      shifts them by one, as transformers' models do;
    - `teacher` [B, A, 2K + 1] int32, A the most answer tokens: row a belongs to the a-th answer
      token of its sequence. K ids, then the bits of K logits and of the log-sum-exp at the
      temperature, float32; ids of -1 where there are fewer.

    Configuration and vocabulary are those of `dataset`, also for the items of another one.
    `pad_token_id` only fills: no token attends to it. `pad_to`: give every batch this many tokens,
    and as many teacher rows, where equal shapes are required (batches that are concatenated,
    compiled models); None: as many as its longest sample has.
    """

    def __init__(
        self, dataset: StoreDataset, *, pad_token_id: int = 0, pad_to: int | None = None
    ) -> None:
        self.config: KDConfig = dataset.config
        self.vocab_size, self.top_k = dataset.vocab_size, dataset.top_k
        self.stores, self.compares_tokenizer = dataset.stores, dataset.compares_tokenizer
        self.pad_token_id, self.pad_to = pad_token_id, pad_to

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate samples.

        Errors: NemoKDError for a sample of more than `pad_to` tokens, of another vocabulary, for
        one that is not of a store, and as `loss`.
        """
        longest = max(len(self._checked(sample).input_ids) for sample in samples)
        shape = len(samples), self.pad_to or longest
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for b, sample in enumerate(samples):
            ids = torch.from_numpy(sample.input_ids.astype(np.int64))
            answers = torch.from_numpy(sample.answer_positions())
            batch["input_ids"][b, : len(ids)] = ids
            batch["attention_mask"][b, : len(ids)] = 1
            batch["labels"][b, answers] = ids[answers]
        return {**batch, TEACHER: self._teacher(samples)}

    def loss(
        self,
        logits: Tensor,
        batch: Mapping[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
        *,
        config: KDConfig | None = None,
    ) -> Tensor:
        """Σ loss over the batch's answer tokens / their number, in nats; differentiable.

        logits [B, S, V]: at position s the prediction of token s + 1. `num_items_in_batch` divides
        instead: the number of answer tokens of all batches of the step, so that the gradients of
        these batches add up to that of a single one. `config` as in `token_losses`.

        Errors: as `token_losses`.
        """
        return mean(self.sums(logits, batch, config=config), num_items_in_batch)

    def sums(
        self, logits: Tensor, batch: Mapping[str, Tensor], *, config: KDConfig | None = None
    ) -> dict[str, Tensor]:
        """Σ `loss` over the batch's answer tokens, differentiable; Σ `sft_loss`, Σ `kd_loss` and
        the number of `answer_tokens`, for logs.

        Errors: as `token_losses`.
        """
        result = self.token_losses(logits, batch, config=config)
        logged = {"sft_loss": result.nll, "kd_loss": result.kd}
        return {
            "loss": result.loss.sum(),
            **{name: value.detach().sum() for name, value in logged.items()},
            "answer_tokens": (batch["labels"] != IGNORED).sum(),
        }

    def token_losses(
        self, logits: Tensor, batch: Mapping[str, Tensor], *, config: KDConfig | None = None
    ) -> KDLoss:
        """Loss, cross-entropy and distillation of each position [B, S]; 0 where not learned.

        Position s has the values of token s + 1. On a GPU the host waits for the number of answer
        tokens. `config`: the settings of this step, such as `schedule.at(step, max_steps)`; None:
        those of the data set.

        Errors: NemoKDError if logits and labels differ in shape or the vocabulary is too small,
        if there are more or fewer teacher rows than answer tokens, and for settings that change
        from step to step without `config`.
        """
        config = self.config if config is None else config
        labels = batch["labels"]
        if logits.shape[:-1] != labels.shape or logits.shape[-1] < self.vocab_size:
            raise NemoKDError(
                f"logits have shape {tuple(logits.shape)}, expected {(*labels.shape, 'V')} with "
                f"V >= {self.vocab_size}, the vocabulary of the store: packing, virtual tokens and "
                "another vocabulary do not work"
            )
        following = torch.full_like(labels, IGNORED)
        following[:, :-1] = labels[:, 1:]
        return sft_kd_loss(
            logits,
            following,
            self._unpacked(batch[TEACHER], config.temperature),
            config,
            vocab_size=self.vocab_size,
            mask=following != IGNORED,
        )

    def _checked(self, sample: Sample) -> Sample:
        if not isinstance(sample, Sample):
            raise NemoKDError(
                f"StoreCollator got a {type(sample).__name__}; expected items of a StoreDataset"
            )
        length = len(sample.input_ids)
        if self.pad_to is not None and length > self.pad_to:
            raise NemoKDError(
                f"row {sample.row} has {length} tokens, more than pad_to={self.pad_to}: raise it, "
                "or set max_seq_length of the data set"
            )
        largest = max(int(ids.max(initial=0)) for ids in (sample.input_ids, sample.topk.ids))
        if largest >= self.vocab_size:
            raise NemoKDError(
                f"row {sample.row} has id {largest}, but the vocabulary {self.vocab_size} ids: "
                "give the collator a data set of the same tokenizer"
            )
        self._check_teacher(sample.topk)
        return sample

    def _check_teacher(self, topk: TopK) -> None:
        config = self.config
        if not isinstance(config, KDSchedule):
            checked_teacher(topk, config, None)
            return
        checked_teacher(topk, config.at(0, 1), None)
        # At later temperatures the log-sum-exp is not used.
        checked_teacher(replace(topk, logsumexp=None), config.end, None)

    def _teacher(self, samples: Sequence[Sample]) -> Tensor:
        """Pack the rows of all samples [B, A, 2K + 1]."""
        teachers = [teacher_of(sample, self.config.temperature) for sample in samples]
        counts = np.array([len(teacher) for teacher in teachers])
        rows = _packed(joined(teachers), self.top_k if self.pad_to else 0)  # [N, 2K + 1]
        shape = len(samples), self.pad_to or counts.max(initial=0), rows.shape[1]
        packed = np.full(shape, ABSENT_ID, np.int32)
        packed[np.arange(shape[1]) < counts[:, None]] = rows  # in row-major order, as they are
        return torch.from_numpy(packed)

    def _unpacked(self, rows: Tensor, temperature: float) -> TopK:
        """The teacher's rows; without a log-sum-exp if it is not the one at `temperature`."""
        topk = _unpacked(rows, self.config.temperature)
        return topk if temperature == self.config.temperature else replace(topk, logsumexp=None)


def mean(sums: Mapping[str, Tensor], num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Σ loss / the answer tokens of the batch, or of all batches of the step if they are given."""
    count = sums["answer_tokens"]
    if num_items_in_batch is not None:  # transformers repeats it for each device of a process
        count = torch.as_tensor(num_items_in_batch).reshape(-1)[0]
    return sums["loss"] / count.to(sums["loss"].device).clamp(min=1)


def _packed(topk: TopK, width: int) -> NDArray[np.int32]:
    """[N, 2K + 1] of numpy rows at one temperature; K at least `width`."""
    missing = ((0, 0), (0, max(0, width - topk.ids.shape[1])))
    ids = np.pad(topk.ids, missing, constant_values=ABSENT_ID).astype(np.int32)
    logits = np.pad(topk.logits, missing, constant_values=-np.inf)
    values = np.concatenate([logits, topk.logsumexp[:, None]], 1).astype(np.float32)
    return np.concatenate([ids, values.view(np.int32)], 1)


def _unpacked(rows: Tensor, temperature: float) -> TopK:
    """The rows of [B, A, 2K + 1] that have an id, in row-major order."""
    rows = rows[rows[..., 0] != ABSENT_ID]  # [N, 2K + 1]
    k = rows.shape[-1] // 2
    values = rows[:, k:].contiguous().view(torch.float32)
    return TopK(
        ids=rows[:, :k].long(),
        logits=values[:, :-1],
        logsumexp=values[:, -1],
        temperatures=(temperature,),
    )
