"""NeMo's `MegatronGPTSFTModel` with a distillation loss on stored teacher top-K logits.

Three seams, each one small override: data sets come from a store (`_build_dataset`), a
micro-batch's teacher tensors are set aside before NeMo's forward (`get_batch`), and on the last
pipeline stage `StudentLoss` takes the place of Megatron's `compute_language_model_loss`.
"""

from __future__ import annotations

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
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from nemo_kd.data import TEACHER_KEYS, teacher_at
from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.context import own_positions
from nemo_kd.mcore.lm_head import gpt_module
from nemo_kd.nemo.blend import blend, blend_files, build_datasets
from nemo_kd.nemo.config import check_train_data, kd_training_config, store_directories
from nemo_kd.nemo.generation import GeneratingSFTModel, check_generation
from nemo_kd.nemo.order import Order, reorder_files
from nemo_kd.nemo.packed import check_packing
from nemo_kd.nemo.record import Progress, read
from nemo_kd.nemo.resume import WholeRunBatchSampler

NEMO_SFT = f"{MegatronGPTSFTModel.__module__}.{MegatronGPTSFTModel.__qualname__}"


class MegatronGPTSFTKDModel(GeneratingSFTModel):
    """SFT + KD: `loss = sft_weight * cross-entropy + kd_weight * divergence`, nats a token.

    Tensor, pipeline, sequence and data parallel. Configuration: `model.kd`
    (`KDTrainingConfig`) and `store` in `model.data.{train,validation}_ds`.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        _refuse_unsupported(cfg)
        super().__init__(cfg, trainer)
        # What is saved must load in a NeMo without this package.
        self.cfg.target = NEMO_SFT
        self._done = Progress()  # in earlier starts of the run
        gpt = gpt_module(self.model)
        if gpt.post_process:
            self.student_loss.attach(gpt, self.kd_schedule.fused_lm_head)

    # --- data ----------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        if self.trainer.ckpt_path:
            self._done, _ = read(self.trainer.ckpt_path)
        super().setup(stage)

    def _extract_consumed_samples_from_ckpt(self, ckpt_path: str) -> int:
        """NeMo's is a number in the checkpoint's name, which need not be in it."""
        return self._done.consumed_samples

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """NeMo's multiplies micro-batches of `train_ds` with the micro-batch size of `model`."""
        batch = self.cfg.data.train_ds.global_batch_size
        return int(self.init_consumed_samples + steps_since_resume * batch)

    def _build_dataset(self, data_cfg: DictConfig, is_train: bool = True) -> Any:
        check_packing(data_cfg)
        if not is_train:
            return self._build_validation(data_cfg)
        if store_directories(data_cfg):
            datasets = build_datasets(self, data_cfg)
            steps = self.trainer.max_steps - self._done.step
            wanted = self._done.consumed_samples + steps * data_cfg.global_batch_size
            return blend(datasets, wanted, data_cfg)
        check_train_data(data_cfg, self.kd_schedule)
        if data_cfg.get("packed_sequence", False):
            return super()._build_dataset(data_cfg, is_train)  # NeMo's own packed files
        number = self.trainer.max_steps * data_cfg.global_batch_size
        blended = blend_files(self, number, data_cfg)
        reorder_files(blended, Order.of(data_cfg))
        return blended

    def _build_validation(self, data_cfg: DictConfig) -> Any:
        check_generation(self.cfg, data_cfg)
        if not data_cfg.get("packed_sequence", False):
            return build_datasets(self, data_cfg, training=False)
        if store_directories(data_cfg):
            raise NemoKDError(
                "model.data.validation_ds.packed_sequence=true with stores: they are measured "
                "sample by sample; set it to false"
            )
        return super()._build_dataset(data_cfg, is_train=False)  # NeMo's own packed files

    def build_data_loader(
        self, dataset: Any, data_cfg: DictConfig, consumed_samples: int = 0
    ) -> DataLoader[Any]:
        """NeMo's, but a run that is resumed goes on with the sample where it was."""
        blended = isinstance(dataset, BlendableDataset)  # training data
        sampler = WholeRunBatchSampler(
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=data_cfg.micro_batch_size,
            global_batch_size=data_cfg.global_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            drop_last=data_cfg.drop_last,
            pad_samples_to_global_batch_size=not data_cfg.drop_last,
            batches_done=self._done.step if blended else 0,
        )
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=dataset.datasets[0].collate_fn if blended else dataset.collate_fn,
            num_workers=data_cfg.num_workers,
            pin_memory=data_cfg.pin_memory,
            persistent_workers=data_cfg.num_workers > 0,
        )

    def get_batch(self, data_iterator: Iterator[Any], tuning: bool) -> dict[str, Any]:
        """NeMo's micro-batch; its teacher tensors are kept for the loss of the same forward."""
        batch = super().get_batch(data_iterator, tuning)
        teacher = {key: batch.pop(key) for key in TEACHER_KEYS if key in batch}
        self.student_loss.teacher = None
        if teacher and parallel_state.is_pipeline_last_stage():
            device = torch.cuda.current_device()
            on_device = {key: value.to(device, non_blocking=True) for key, value in teacher.items()}
            mask = batch["loss_mask"].to(device)
            self.student_loss.teacher = teacher_at(on_device, mask, own_positions(mask.shape[1]))
        return batch

    # --- loss ----------------------------------------------------------------------------------

    def loss_func(
        self, loss_mask: torch.Tensor, num_valid_tokens_in_ub: Any, output_tensor: torch.Tensor
    ) -> torch.Tensor:
        """Sum over answer tokens, divided as `model.kd.normalize` says; 0 without any."""
        if self.kd_schedule.normalize == "microbatch" or self.student_loss.forward_only:
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
        self.student_loss.forward_only = forward_only
        if not forward_only:
            count = batch["loss_mask"].sum().to(torch.cuda.current_device())
            torch.distributed.all_reduce(count, group=parallel_state.get_data_parallel_group())
            self._answer_tokens = count
        return super().fwd_bwd_step(iter([batch]), forward_only, first_val_step)


def _refuse_unsupported(cfg: DictConfig) -> None:
    if not cfg.get("mcore_gpt", False):
        raise NemoKDError("model.mcore_gpt must be true: nemo_kd works with Megatron-core models")
    if cfg.get("context_parallel_size", 1) > 1:
        _refuse_with_context_parallelism(cfg)


def _refuse_with_context_parallelism(cfg: DictConfig) -> None:
    where = f"model.context_parallel_size={cfg.context_parallel_size}"
    if kd_training_config(cfg.get("kd")).positions != "all":
        raise NemoKDError(
            f"model.kd.positions={cfg.kd.positions} with {where}: each rank would choose among its "
            "own part of a sequence; set model.kd.positions=all"
        )
    if cfg.data.get("train_ds") and cfg.data.train_ds.get("packed_sequence", False):
        raise NemoKDError(
            f"model.data.train_ds.packed_sequence=true with {where} is not supported: samples of a "
            "store are not padded so that each could be cut; set one of them back"
        )
