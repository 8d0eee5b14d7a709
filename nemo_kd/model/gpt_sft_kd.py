"""NeMo's `MegatronGPTSFTModel` with a distillation loss on stored teacher top-K logits.

Three seams, each one small override: data sets come from a store (`_build_dataset`), a
micro-batch's teacher tensors are set aside before NeMo's forward (`get_batch`), and Megatron's
`compute_language_model_loss` is replaced on the last pipeline stage, where the logits are.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import BlendableDataset
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
    MegatronGPTSFTModel,
)
from omegaconf import DictConfig, ListConfig, open_dict
from torch.utils.data import DataLoader

from nemo_kd.data import TEACHER_KEYS, TeacherSelection, teacher_at
from nemo_kd.loss import KDLoss, MassWatch, TopK, linear_sft_kd_loss, sft_kd_loss
from nemo_kd.megatron import gpt_module, split_lm_head
from nemo_kd.model.config import kd_training_config
from nemo_kd.model.metrics import MetricSums
from nemo_kd.model.resume import (
    WholeRunBatchSampler,
    check_same_stores,
    remember_stores,
    trained_on,
)
from nemo_kd.model.stores import build_store_datasets
from nemo_kd.store import Store

NEMO_SFT = f"{MegatronGPTSFTModel.__module__}.{MegatronGPTSFTModel.__qualname__}"


class MegatronGPTSFTKDModel(MegatronGPTSFTModel):
    """SFT + KD: `loss = sft_weight * cross-entropy + kd_weight * divergence`, nats a token.

    Tensor, pipeline, sequence and data parallel. Configuration: `model.kd`
    (`KDTrainingConfig`) and `store` in `model.data.{train,validation}_ds`.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        self.kd_schedule = kd_training_config(cfg.get("kd"))
        self.kd = self.kd_schedule.at(0, 1)  # the settings of the step that runs
        _refuse_unsupported(cfg)
        super().__init__(cfg, trainer)
        # What is saved must load in a NeMo without this package.
        self.cfg.target = NEMO_SFT
        self._train_stores: list[Store] = []
        self._teacher: TeacherSelection | None = None
        self._answer_tokens = torch.zeros(())  # of the global batch, all data-parallel ranks
        self._forward_only = False
        self._clock: float | None = None
        self._step_sums = MetricSums()
        self._validation_sums: dict[int, MetricSums] = {}
        self._sums = self._step_sums
        self._watch_mass = MassWatch(self.kd.temperature)
        gpt = gpt_module(self)
        if gpt.post_process:
            self._gpt_forward, self._sft_loss = gpt.forward, gpt.compute_language_model_loss
            gpt.compute_language_model_loss = self._language_model_loss
            plain = self._is_plain_sft() and not self.kd_schedule.distils
            if self.kd.fused_lm_head and not plain:
                gpt.forward = self._fused_forward

    # --- data ----------------------------------------------------------------------------------

    def _build_dataset(self, data_cfg: DictConfig, is_train: bool = True) -> Any:
        if data_cfg.get("store"):
            stores, datasets = build_store_datasets(self, data_cfg, is_train)
            if is_train:
                self._train_stores = stores
                with open_dict(self.cfg):  # what a `.nemo` says of itself
                    self.cfg.kd_train_stores = trained_on(stores)
            return datasets
        if is_train and self.kd_schedule.distils:
            raise ValueError(
                "model.data.train_ds.store is not set, so there are no teacher logits to learn "
                "from; give the store of examples/dump_teacher_topk.py, or set model.kd.alpha=0 "
                "for SFT alone on model.data.train_ds.file_names"
            )
        if data_cfg.get("file_names") is None and not is_train:
            return []  # a run without validation data
        return super()._build_dataset(data_cfg, is_train)

    def build_data_loader(
        self, dataset: Any, data_cfg: DictConfig, consumed_samples: int = 0
    ) -> DataLoader[Any]:
        """NeMo's, but a run that is resumed goes on with the sample where it was."""
        blended = isinstance(dataset, BlendableDataset)
        sampler = WholeRunBatchSampler(
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=data_cfg.micro_batch_size,
            global_batch_size=data_cfg.global_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            drop_last=data_cfg.drop_last,
            pad_samples_to_global_batch_size=not data_cfg.drop_last,
        )
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=dataset.datasets[0].collate_fn if blended else dataset.collate_fn,
            num_workers=data_cfg.num_workers,
            pin_memory=data_cfg.pin_memory,
            persistent_workers=data_cfg.num_workers > 0,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        remember_stores(self._train_stores, checkpoint, dataclasses.asdict(self.kd_schedule))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_stores(self._train_stores, checkpoint)
        super().on_load_checkpoint(checkpoint)

    def get_batch(self, data_iterator: Iterator[Any], tuning: bool) -> dict[str, Any]:
        """NeMo's micro-batch; its teacher tensors are kept for the loss of the same forward."""
        batch = super().get_batch(data_iterator, tuning)
        teacher = {key: batch.pop(key) for key in TEACHER_KEYS if key in batch}
        self._teacher = None
        if teacher and parallel_state.is_pipeline_last_stage():
            device = torch.cuda.current_device()
            on_device = {key: value.to(device, non_blocking=True) for key, value in teacher.items()}
            self._teacher = teacher_at(on_device, batch["loss_mask"].to(device))
        return batch

    # --- loss ----------------------------------------------------------------------------------

    def _language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [B, S], logits [S, B, Vp] → loss [B, S], zero outside the answers.

        The place of Megatron's `compute_language_model_loss`; vocabulary-parallel over the
        tensor-parallel group: two small all-reduces forward, none backward.
        """
        teacher, self._teacher = self._teacher, None
        if teacher is None:
            return self._loss_without_teacher(labels, logits)
        if self._is_plain_sft():
            with torch.no_grad():
                self._sums.add(self._sft_kd(labels, logits.detach(), teacher, inplace=False))
            return self.kd.weights[0] * self._sft_loss(labels, logits)
        result = self._sft_kd(labels, logits, teacher, inplace=True)
        self._sums.add(result)
        return result.loss.t().contiguous()

    def _sft_kd(
        self, labels: torch.Tensor, logits: torch.Tensor, teacher: TeacherSelection, inplace: bool
    ) -> KDLoss:
        return sft_kd_loss(
            logits,
            labels.t(),
            self._at_temperature(teacher),
            self.kd,
            group=parallel_state.get_tensor_model_parallel_group(),
            vocab_size=self.tokenizer.vocab_size,
            mask=teacher.mask,
            inplace=inplace,
        )

    def _at_temperature(self, teacher: TeacherSelection) -> TopK:
        """The data sets' log-sum-exp is at the schedule's first temperature; others are unknown."""
        if self.kd.temperature == self.kd_schedule.temperature:
            return teacher.topk
        return teacher.topk._replace(logsumexp=None)

    def _fused_forward(
        self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The GPTModel's forward, its LM head and loss in one where there are teacher rows."""
        if labels is None or self._teacher is None:
            return self._gpt_forward(*args, labels=labels, **kwargs)
        teacher, self._teacher = self._teacher, None
        gpt = gpt_module(self)
        with split_lm_head(gpt):
            hidden = self._gpt_forward(*args, labels=None, **kwargs)  # [S, B, H], or [S/TP, B, H]
        tied = gpt.share_embeddings_and_output_weights
        customization = self.cfg.get("mcore_customization_config") or {}
        result = linear_sft_kd_loss(
            hidden,
            gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight,
            labels.t(),
            self._at_temperature(teacher),
            self.kd,
            group=parallel_state.get_tensor_model_parallel_group(),
            vocab_size=self.tokenizer.vocab_size,
            mask=teacher.mask,
            sequence_parallel=gpt.config.sequence_parallel,
            logit_softcap=customization.get("final_logit_softcapping") or None,
        )
        self._sums.add(result)
        return result.loss.t().contiguous()

    def _loss_without_teacher(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.kd_schedule.distils and not self._forward_only:
            raise ValueError(
                "the weight of the distillation is above 0, but this training batch has no "
                "teacher rows: every training set needs a store"
            )
        return self._sft_loss(labels, logits)

    def _is_plain_sft(self) -> bool:
        """Without a KD term Megatron's own cross-entropy trains: NeMo's SFT bit for bit."""
        padding = self.padded_vocab_size - self.tokenizer.vocab_size
        return not self.kd.weights[1] and (self.kd.count_padding or not padding)

    def loss_func(
        self, loss_mask: torch.Tensor, num_valid_tokens_in_ub: Any, output_tensor: torch.Tensor
    ) -> torch.Tensor:
        """Sum over answer tokens, divided as `model.kd.normalize` says; 0 without any."""
        if self.kd.normalize == "microbatch" or self._forward_only:
            count = num_valid_tokens_in_ub.clamp(min=1)
            return super().loss_func(loss_mask, count, output_tensor)
        # Megatron divides by the number of micro-batches, NeMo by that of data-parallel ranks.
        parts = get_num_microbatches() * parallel_state.get_data_parallel_world_size()
        count = self._answer_tokens.clamp(min=1) / parts
        return super().loss_func(loss_mask, count, output_tensor)

    def fwd_bwd_step(
        self, dataloader_iter: Iterator[Any], forward_only: bool, first_val_step: Any = None
    ) -> Any:
        batch = next(dataloader_iter)
        batch = batch[0] if isinstance(batch, tuple) else batch
        self._forward_only = forward_only
        if not forward_only:
            count = batch["loss_mask"].sum().to(torch.cuda.current_device())
            torch.distributed.all_reduce(count, group=parallel_state.get_data_parallel_group())
            self._answer_tokens = count
        return super().fwd_bwd_step(iter([batch]), forward_only, first_val_step)

    # --- metrics -------------------------------------------------------------------------------

    def training_step_fwd_bwd_step_call(
        self, dataloader_iter: Iterator[Any], forward_only: bool
    ) -> torch.Tensor:
        self.kd = self.kd_schedule.at(self.trainer.global_step, self.trainer.max_steps)
        self._sums = self._step_sums
        self._sums.reset()
        loss = super().training_step_fwd_bwd_step_call(dataloader_iter, forward_only)
        means = self._step_sums.means(self.kd)
        if "teacher_mass" in means and self.kd.weights[1] and not self.global_rank:
            # NeMo takes Python's warnings away into its own log: this one must be seen.
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self._watch_mass(means["teacher_mass"])
            for warning in caught:
                print(f"WARNING: {warning.message}", file=sys.stderr, flush=True)
        if self.kd_schedule.scheduled:
            means["kd_weight"], means["temperature"] = self.kd.weights[1], self.kd.temperature
        # From one step's backward to the next one's: data, forward, backward, optimizer.
        now = time.perf_counter()
        assert self._clock is not None  # set by on_train_batch_start
        means["tokens_per_s"] = float(self._answer_tokens) / (now - self._clock)
        self._clock = now
        for name, value in means.items():
            self.log(name, value, batch_size=1, rank_zero_only=True)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int, unused: int = 0) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()

    def on_validation_epoch_start(self) -> None:
        self._validation_sums.clear()
        self._clock = None  # its time is no training step's
        return super().on_validation_epoch_start()

    def inference_step_validation_call(
        self, batch: Any, batch_idx: int, data_cfg: DictConfig, dataloader_idx: int = 0
    ) -> Any:
        self.kd = self.kd_schedule.end  # so that one validation can be compared with the next
        self._sums = self._validation_sums.setdefault(dataloader_idx, MetricSums())
        return super().inference_step_validation_call(batch, batch_idx, data_cfg, dataloader_idx)

    def inference_epoch_end(self, outputs: Any, mode: str, data_cfg: DictConfig) -> Any:
        result = super().inference_epoch_end(outputs, mode, data_cfg)
        for index, sums in sorted(self._validation_sums.items()):
            for name, value in sums.means(self.kd).items():
                key = (
                    f"{'val' if mode == 'validation' else mode}/{_set_name(data_cfg, index)}/{name}"
                )
                self.log(key, value, batch_size=1)  # on every rank: it may be monitored
        return result


def _set_name(data_cfg: DictConfig, index: int) -> str:
    names = data_cfg.get("names")
    if names is None:
        return f"set{index}"
    return names[index] if isinstance(names, ListConfig) else names


def _refuse_unsupported(cfg: DictConfig) -> None:
    if not cfg.get("mcore_gpt", False):
        raise ValueError("model.mcore_gpt must be true: nemo_kd works with Megatron-core models")
    if cfg.get("context_parallel_size", 1) > 1:
        raise ValueError(
            f"model.context_parallel_size={cfg.context_parallel_size} is not supported with "
            "distillation yet; use tensor, pipeline, sequence and data parallelism"
        )
    if cfg.data.get("train_ds") and cfg.data.train_ds.get("packed_sequence", False):
        raise ValueError(
            "model.data.train_ds.packed_sequence=true is not supported with distillation yet"
        )
