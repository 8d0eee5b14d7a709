"""The store and the loss in a training loop of Megatron-core's own: no NeMo.

`StoreBatches` is the data iterator of a data-parallel rank, `kd_forward_step` the function that
Megatron's schedules call. Megatron-LM and Megatron-Bridge train through the same schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from nemo_kd.data import (
    TeacherRows,
    TeacherSelection,
    collate_teacher,
    cut_prompt,
    fit_lengths,
    teacher_at,
)
from nemo_kd.loss import KDConfig, sft_kd_loss
from nemo_kd.mcore.context import own_positions
from nemo_kd.store import Store, StoreError

Batch = dict[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


class StoreBatches:
    """Micro-batches of one data-parallel rank, without end: each epoch has every sample once.

    The order follows from `seed` alone. The micro-batches of a step, over all ranks, are the next
    `global_batch_size` samples, on any number of ranks; `consumed_samples` is where a resumed run
    goes on. A micro-batch has `tokens`, `labels`, `loss_mask` and `position_ids` [B, seq_length]
    and the teacher's tensors of `collate_teacher`, on the CPU.

    Errors: StoreError for samples of more than `seq_length + 1` tokens (see `over_long`), for a
    temperature that was not dumped, and where there are fewer samples than `global_batch_size`.
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
        over_long: str = "refuse",
    ) -> None:
        store.check(temperature=temperature)
        self.store = store
        self.seq_length = seq_length
        self.used = fit_lengths(store, seq_length + 1, over_long).used
        self.temperature_index = store.manifest.spec.temperatures.index(temperature)
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.seed, self.consumed_samples = seed, consumed_samples
        # One epoch's order serves all of its samples; a step may reach into the next.
        self._order_of = lru_cache(maxsize=2)(self._order)
        self.ranks = parallel_state.get_data_parallel_world_size()
        if global_batch_size % (micro_batch_size * self.ranks):
            raise StoreError(
                f"global_batch_size={global_batch_size} is no multiple of micro_batch_size × "
                f"data-parallel ranks = {micro_batch_size} × {self.ranks}"
            )
        if len(self.used) < global_batch_size:
            raise StoreError(
                f"store {store.directory} has {len(self.used)} samples, fewer than "
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
        """[samples]: their places in the store, in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.used)

    def _batch(self, places: range) -> Batch:
        """The samples at these places of the endless sequence of epochs."""
        shape = len(places), self.seq_length
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("tokens", "labels")}
        batch["loss_mask"] = torch.zeros(shape)
        batch["position_ids"] = torch.arange(self.seq_length).expand(shape)
        teachers = []
        for b, place in enumerate(places):
            epoch, position = divmod(place, len(self.used))
            place_in_store = int(self._order_of(epoch)[position])
            sample = cut_prompt(self.store[place_in_store], self.seq_length + 1)
            ids = torch.from_numpy(sample.input_ids.astype(np.int64))
            batch["tokens"][b, : len(ids) - 1] = ids[:-1]
            batch["labels"][b, : len(ids) - 1] = ids[1:]
            batch["loss_mask"][b, : len(ids) - 1] = torch.from_numpy(sample.loss_mask[1:].copy())
            teachers.append(TeacherRows.of(sample, self.temperature_index))
        return batch | collate_teacher(teachers)


def kd_forward_step(
    config: KDConfig, vocab_size: int
) -> Callable[[Iterator[Batch], Any], tuple[torch.Tensor, LossFunction]]:
    """The `forward_step_func` of Megatron's schedules for a `GPTModel`.

    Its loss function gives (Σ loss over the micro-batch's answer tokens, their number, sums for
    the logs): the schedule divides by the number, of the micro-batch, or of the global batch with
    `TransformerConfig.calculate_per_token_loss`. Tensor, pipeline, sequence and data
    parallel, and context parallel where the model's attention is. Under a virtual pipeline each
    chunk of the model has a `StoreBatches` of its own.
    """

    def step(iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, LossFunction]:
        batch = {
            name: tensor.to(torch.cuda.current_device(), non_blocking=True)
            for name, tensor in next(iterator).items()
        }
        at = own_positions(batch["tokens"].shape[1])
        teacher = teacher_at(batch, batch["loss_mask"], at)
        tokens, labels, positions = (
            batch[name] if at is None else batch[name][:, at]
            for name in ("tokens", "labels", "position_ids")
        )
        output = model(tokens, positions, attention_mask=None)
        return output, partial(_loss, labels, teacher, config, vocab_size)

    return step


def _loss(
    labels: torch.Tensor,
    teacher: TeacherSelection,
    config: KDConfig,
    vocab_size: int,
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """labels [B, S], logits [B, S, Vp] of this tensor- and context-parallel rank."""
    result = sft_kd_loss(
        logits.transpose(0, 1),
        labels.t(),
        replace(teacher.topk, temperatures=(config.temperature,)),
        config,
        group=parallel_state.get_tensor_model_parallel_group(),
        vocab_size=vocab_size,
        mask=teacher.mask,
        inplace=True,
    )
    count = teacher.mask.sum()
    sums = {"sft_loss": result.nll, "kd_loss": result.kd, "loss": result.loss}
    report = {name: value.detach().sum() for name, value in sums.items()}
    report["answer_tokens"] = count
    return result.loss.sum(), count.clamp(min=1).to(torch.int), report
