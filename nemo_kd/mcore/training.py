"""Train on a store in Megatron-core's own training loop, without NeMo.

`StoreBatches` is the data iterator of a data-parallel rank, `kd_forward_step` the function that
Megatron's schedules call. Megatron-LM and Megatron-Bridge train through the same schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from nemo_kd.data import AnswerTokens, answer_tokens, fit_lengths, teacher_of, truncate_prompt
from nemo_kd.loss import KDConfig, sft_kd_loss
from nemo_kd.mcore.context import own_positions
from nemo_kd.store import Sample, Store, StoreError

Batch = dict[str, Any]
"""`tokens`, `labels`, `loss_mask` and `position_ids` [B, S], and `answers`, an `AnswerTokens`."""
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


class StoreBatches:
    """Endless iterator over the micro-batches of one data-parallel rank.

    Each epoch contains every sample once.

    The order depends only on `seed`: the micro-batches of a step, over all ranks, are the next
    `global_batch_size` samples on any number of ranks, and a resumed run skips the first
    `consumed_samples`. A micro-batch has `tokens`, `labels`, `loss_mask` and `position_ids`
    [B, seq_length / C], this context-parallel rank's part of C, and their `answers`, on the CPU.

    Errors: StoreError for samples of more than `seq_length + 1` tokens (see `over_long`), for a
    temperature that was not dumped, and for fewer samples than `global_batch_size`.
    """

    def __init__(
        self,
        store: Store,
        *,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        temperature: float = 1.0,
        seed: int = 0,
        consumed_samples: int = 0,
        over_long: str = "error",
    ) -> None:
        store.check(temperature=temperature)
        self.store = store
        self.seq_length = seq_length
        self.used = fit_lengths(store, seq_length + 1, over_long).used
        self.temperature = temperature
        self.own_positions = own_positions(seq_length)
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.seed, self.consumed_samples = seed, consumed_samples
        # Two entries, since the batch of a step may extend into the next epoch.
        self._order_of = lru_cache(maxsize=2)(self._order)
        self.ranks = parallel_state.get_data_parallel_world_size()
        if global_batch_size % (micro_batch_size * self.ranks):
            raise StoreError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size × "
                f"data-parallel ranks = {micro_batch_size} × {self.ranks}"
            )
        if len(self.used) < global_batch_size:
            raise StoreError(
                f"store {store.origin} has {len(self.used)} samples, fewer than "
                f"global_batch_size={global_batch_size}"
            )

    def __iter__(self) -> Iterator[Batch]:
        rank = parallel_state.get_data_parallel_rank()
        while True:
            start = self.consumed_samples
            self.consumed_samples += self.global_batch_size
            mine = range(start + rank, self.consumed_samples, self.ranks)
            for first in range(0, len(mine), self.micro_batch_size):
                yield self._batch(mine[first : first + self.micro_batch_size])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the store indices of an epoch's samples in training order, [samples]."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.used)

    def _sample(self, draw: int) -> Sample:
        """Return a sample by its index in the endless sequence of epochs."""
        epoch, position = divmod(draw, len(self.used))
        index = int(self._order_of(epoch)[position])
        return truncate_prompt(self.store[index], self.seq_length + 1)

    def _batch(self, draws: range) -> Batch:
        shape = len(draws), self.seq_length
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("tokens", "labels")}
        batch["loss_mask"] = torch.zeros(shape)
        batch["position_ids"] = torch.arange(self.seq_length).expand(shape)
        teachers = []
        for b, draw in enumerate(draws):
            sample = self._sample(draw)
            ids = torch.from_numpy(sample.input_ids.astype(np.int64))
            batch["tokens"][b, : len(ids) - 1] = ids[:-1]
            batch["labels"][b, : len(ids) - 1] = ids[1:]
            batch["loss_mask"][b, : len(ids) - 1] = torch.from_numpy(sample.loss_mask[1:].copy())
            teachers.append(teacher_of(sample, self.temperature))
        own = self.own_positions
        answers = answer_tokens(batch["loss_mask"], teachers, own_positions=own)
        mine = {name: x if own is None else x[:, own] for name, x in batch.items()}
        return {**mine, "answers": answers}


def kd_forward_step(
    config: KDConfig, vocab_size: int
) -> Callable[[Iterator[Batch], Any], tuple[torch.Tensor, LossFunction]]:
    """Return a `forward_step_func` for Megatron's schedules that trains a `GPTModel`.

    Its loss function returns (Σ loss over the micro-batch's answer tokens, their number, a report):
    each term of the report is [Σ, number] over the answer tokens, of which Megatron-LM and
    Megatron-Bridge log the quotient of their sums over micro-batches and ranks. The schedule
    divides by the number of answer tokens, of the micro-batch or, with
    `TransformerConfig.calculate_per_token_loss`, of the global batch. Supports tensor, pipeline,
    sequence and data parallelism, and context parallelism if the model's attention does. Under a
    virtual pipeline each chunk of the model needs its own `StoreBatches`.
    """

    def step(iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, LossFunction]:
        device = torch.cuda.current_device()
        batch = {name: x.to(device, non_blocking=True) for name, x in next(iterator).items()}
        output = model(batch["tokens"], batch["position_ids"], attention_mask=None)
        return output, partial(_loss, batch["labels"], batch["answers"], config, vocab_size)

    return step


def _loss(
    labels: torch.Tensor,
    answers: AnswerTokens,
    config: KDConfig,
    vocab_size: int,
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return (Σ loss, number of answer tokens, term → [Σ, number]) of a micro-batch.

    labels [B, S], logits [B, S, Vp]: of this tensor- and context-parallel rank.
    """
    result = sft_kd_loss(
        logits.transpose(0, 1),
        labels.t(),
        answers.topk,
        config,
        group=parallel_state.get_tensor_model_parallel_group(),
        vocab_size=vocab_size,
        positions=answers.positions,
        inplace=True,
    )
    number = len(answers.positions)
    count = torch.full((), number, dtype=torch.float32, device=logits.device)
    terms = {"sft_loss": result.nll, "kd_loss": result.kd, "loss": result.loss}
    report = {
        name: torch.stack([value.detach().sum(dtype=torch.float32), count])
        for name, value in terms.items()
    }
    divisor = torch.full((), max(number, 1), dtype=torch.int, device=logits.device)
    return result.loss.sum(), divisor, report
