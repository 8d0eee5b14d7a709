"""NeMo's SFT model, logging means over answer tokens per training step and validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    get_num_microbatches,
    reconfigure_num_microbatches_calculator,
)
from omegaconf import DictConfig

from nemo_kd.mcore.device import on_device, pinned
from nemo_kd.mcore.metrics import MetricSums
from nemo_kd.nemo.config import kd_training_config
from nemo_kd.nemo.metrics import StepSums, without_loss_of_no_tokens
from nemo_kd.nemo.splits import ValidationSplit
from nemo_kd.nemo.student_loss import StudentLoss
from nemo_kd.nemo.vocabulary import SFTModel


class ReportingSFTModel(SFTModel):
    """SFT model that begins each step of its `StudentLoss` and keeps or logs the metrics."""

    step_sums: StepSums
    """Of the last training step."""

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        self.kd_schedule = kd_training_config(cfg.get("kd"))
        super().__init__(cfg, trainer)
        customization = cfg.get("mcore_customization_config") or {}
        self.student_loss = StudentLoss(
            self.kd_schedule,
            vocab_size=self.tokenizer.vocab_size,
            padding=self.padded_vocab_size - self.tokenizer.vocab_size,
            logit_softcap=customization.get("final_logit_softcapping") or None,
        )
        self._answer_tokens = torch.zeros(())  # of the global batch, all data-parallel ranks
        self._divisor: torch.Tensor | None = None  # of a micro-batch's loss; None: its own tokens
        self._validation_sums: dict[int, MetricSums] = {}

    def training_step_fwd_bwd_step_call(
        self, dataloader_iter: Iterator[Any], forward_only: bool
    ) -> torch.Tensor:
        """Run the micro-batches of a step; its metrics stay on the device (see `StepMetrics`)."""
        sums = MetricSums()
        kd = self.kd_schedule.at(self.trainer.global_step, self.trainer.max_steps)
        self.student_loss.begin(kd, sums, training=True)
        loss = super().training_step_fwd_bwd_step_call(dataloader_iter, forward_only)
        settings = {"kd_weight": kd.weights[1], "temperature": kd.temperature}
        self.step_sums = StepSums(
            sums=sums.reduced(),
            answer_tokens=self._answer_tokens,
            distils=kd.weights[1] > 0,
            settings=settings if self.kd_schedule.scheduled else {},
        )
        return without_loss_of_no_tokens(loss, self._answer_tokens)

    def fwd_bwd_step(
        self, dataloader_iter: Iterator[Any], forward_only: bool, first_val_step: Any = None
    ) -> Any:
        batch = next(dataloader_iter)
        batch = batch[0] if isinstance(batch, tuple) else batch
        self._divisor = None
        if not forward_only:
            count = on_device(pinned(batch["loss_mask"].sum()))
            torch.distributed.all_reduce(count, group=parallel_state.get_data_parallel_group())
            self._answer_tokens = count
            if self.kd_schedule.normalize == "global_tokens":
                # Megatron divides by micro-batches and NeMo by data-parallel ranks: undo both.
                parts = get_num_microbatches() * parallel_state.get_data_parallel_world_size()
                self._divisor = count.clamp(min=1) / parts
        return super().fwd_bwd_step(iter([batch]), forward_only, first_val_step)

    def loss_func(
        self, loss_mask: torch.Tensor, num_valid_tokens_in_ub: Any, output_tensor: torch.Tensor
    ) -> torch.Tensor:
        """Sum the loss over answer tokens, divided as `model.kd.normalize` selects; 0 if none."""
        own = num_valid_tokens_in_ub.clamp(min=1)
        divisor = own if self._divisor is None else self._divisor
        return super().loss_func(loss_mask, divisor, output_tensor)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        train_ds = self.cfg.data.train_ds
        self._use_micro_batches(train_ds, train_ds.global_batch_size)

    def _reconfigure_and_process_inference_batch(
        self, batch: dict[str, Any], data_cfg: DictConfig
    ) -> None:
        """Set the number of micro-batches for a validation; NeMo sets it only if it changes."""
        ranks = parallel_state.get_data_parallel_world_size()
        self._use_micro_batches(data_cfg, len(batch["tokens"]) * ranks)

    def _use_micro_batches(self, data_cfg: DictConfig, samples: int) -> None:
        """Make Megatron split global batches of `samples` into the micro-batches of a block."""
        reconfigure_num_microbatches_calculator(
            rank=self.global_rank,
            rampup_batch_size=None,
            global_batch_size=samples,
            micro_batch_size=data_cfg.micro_batch_size,
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )

    def on_validation_epoch_start(self) -> None:
        self._validation_sums.clear()
        return super().on_validation_epoch_start()

    def inference_step_validation_call(
        self, batch: Any, batch_idx: int, data_cfg: DictConfig, dataloader_idx: int = 0
    ) -> Any:
        sums = self._validation_sums.setdefault(dataloader_idx, MetricSums())
        # Final settings, so that values are comparable within a run.
        self.student_loss.begin(self.kd_schedule.end, sums, training=False)
        return super().inference_step_validation_call(batch, batch_idx, data_cfg, dataloader_idx)

    def inference_epoch_end(self, outputs: Any, mode: str, data_cfg: DictConfig) -> Any:
        sets = outputs if outputs and isinstance(outputs[0], list) else [outputs]
        split = ValidationSplit.of(data_cfg)
        means = {index: sums.means() for index, sums in sorted(self._validation_sums.items())}
        for index, of_set in means.items():
            # NeMo's own packed files are not measured; a set without an answer token has no loss.
            for output in [] if split.packed_sequence else sets[index]:
                output["loss"] = self._as_nemo_averages(of_set.get("loss", math.nan))
        result = super().inference_epoch_end(outputs, mode, data_cfg)
        prefix = "val" if mode == "validation" else mode
        for index, of_set in means.items():
            for name, value in of_set.items():
                # On every rank, since a checkpoint may monitor it.
                self.log(f"{prefix}/{split.name(index)}/{name}", value, batch_size=1)
        return result

    def _as_nemo_averages(self, loss: float) -> torch.Tensor:
        """A batch's loss in the form that NeMo's mean over batches leaves unchanged.

        NeMo's own is a mean over micro-batches, with 0 for those that have only repeated samples.
        """
        complete = self.cfg.data.get("validation_drop_last", True)
        return torch.tensor(loss if complete else [loss, 1.0], device=torch.cuda.current_device())
