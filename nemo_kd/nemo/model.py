"""NeMo's `MegatronGPTSFTModel` with a distillation loss on stored teacher top-K logits.

Three small overrides connect it to NeMo: `_build_dataset` makes data sets of a store, `get_batch`
passes a micro-batch's answer tokens to the loss before NeMo's forward pass, and on the last
pipeline stage `StudentLoss` replaces Megatron's `compute_language_model_loss`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from megatron.core import parallel_state
from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import BlendableDataset
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
    MegatronGPTSFTModel,
)
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.device import on_device
from nemo_kd.mcore.lm_head import gpt_module
from nemo_kd.nemo.blend import TRAINING, VALIDATION, blend, blend_files, build_datasets
from nemo_kd.nemo.families import check_length
from nemo_kd.nemo.generation import GeneratingSFTModel, check_generation
from nemo_kd.nemo.order import reorder_files
from nemo_kd.nemo.packed import check_packing
from nemo_kd.nemo.record import Progress, read
from nemo_kd.nemo.resume import WholeRunBatchSampler
from nemo_kd.nemo.splits import TrainSplit, ValidationSplit
from nemo_kd.teacher.layout import Layout

NEMO_SFT = f"{MegatronGPTSFTModel.__module__}.{MegatronGPTSFTModel.__qualname__}"


class MegatronGPTSFTKDModel(GeneratingSFTModel):
    """SFT + KD: `loss = sft_weight * cross-entropy + kd_weight * divergence`, in nats per token.

    Tensor, pipeline, sequence and data parallel. Configuration: `model.kd`
    (`KDTrainingConfig`) and `store` in `model.data.{train,validation}_ds`.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        _refuse_unsupported(cfg)
        super().__init__(cfg, trainer)
        # The saved model must load in a NeMo without this package.
        self.cfg.target = NEMO_SFT
        self._done = Progress()  # progress of earlier starts of the run
        # With Megatron's distributed optimizer NeMo keeps a list of one, as for a virtual pipeline.
        (chunk,) = self.get_model_module_list()
        gpt = gpt_module(chunk)
        if gpt.post_process:
            self.student_loss.attach(gpt, self.kd_schedule.fused_lm_head)

    # --- data ----------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        if self.trainer.ckpt_path:
            self._done, _ = read(self.trainer.ckpt_path)
        super().setup(stage)

    def _extract_consumed_samples_from_ckpt(self, ckpt_path: str) -> int:
        """Return the checkpoint's own count; NeMo's is parsed from its name, which may lack it."""
        return self._done.consumed_samples

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """Count global batches of `train_ds`; NeMo mixes sizes of `train_ds` and of `model`."""
        batch = self.cfg.data.train_ds.global_batch_size
        return int(self.init_consumed_samples + steps_since_resume * batch)

    def _build_dataset(self, data_cfg: DictConfig, is_train: bool = True) -> Any:
        check_packing(data_cfg)
        where = TRAINING if is_train else VALIDATION
        check_length(self.cfg, data_cfg.max_seq_length, where)
        if not is_train:
            return self._build_validation(data_cfg)
        split = TrainSplit.of(data_cfg)
        if split.store:
            datasets = build_datasets(self, data_cfg)
            steps = self.trainer.max_steps - self._done.step
            wanted = self._done.consumed_samples + steps * data_cfg.global_batch_size
            return blend(datasets, wanted, data_cfg)
        split.check_sources(self.kd_schedule)
        self._say_without_effect()
        if split.packed_sequence:
            return super()._build_dataset(data_cfg, is_train)  # NeMo's own packed files
        number = self.trainer.max_steps * data_cfg.global_batch_size
        blended = blend_files(self, number, data_cfg)
        reorder_files(blended, split)
        return blended

    def _say_without_effect(self) -> None:
        """Print settings that the training does not read: SFT files alone have Megatron's loss."""
        kd, say = self.kd_schedule, Layout.of_job().say
        if kd.fused_lm_head:
            say("model.kd.fused_lm_head=true has no effect without a store")
        padding = self.padded_vocab_size - self.tokenizer.vocab_size
        if padding and not kd.count_padding:
            say(
                "SFT files without a store are trained with NeMo's own loss: its softmax has the "
                f"vocabulary's {padding} padding columns, too, which "
                "model.kd.count_padding=false leaves out of the losses of stores and of validations"
            )

    def _build_validation(self, data_cfg: DictConfig) -> Any:
        check_generation(self.cfg, data_cfg)
        split = ValidationSplit.of(data_cfg)
        if not split.packed_sequence:
            return build_datasets(self, data_cfg, training=False)
        if split.store:
            raise NemoKDError(
                "model.data.validation_ds.packed_sequence=true with stores: they are measured "
                "sample by sample; set it to false"
            )
        return super()._build_dataset(data_cfg, is_train=False)  # NeMo's own packed files

    def build_data_loader(
        self, dataset: Any, data_cfg: DictConfig, consumed_samples: int = 0
    ) -> DataLoader[Any]:
        """NeMo's, except that a resumed run continues with the next sample."""
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
        """Return NeMo's micro-batch, and pass its answer tokens to the loss of the same pass."""
        batch = super().get_batch(data_iterator, tuning)
        answers = batch.pop("answer_tokens", None)  # NeMo's own `answers` are other tensors
        if answers is not None and parallel_state.is_pipeline_last_stage():
            (one,) = answers  # NeMo splits the list into lists of one per micro-batch
            answers = on_device(one)
        self.student_loss.hand_over(answers)
        return batch


def _refuse_unsupported(cfg: DictConfig) -> None:
    if not cfg.get("mcore_gpt", False):
        raise NemoKDError("model.mcore_gpt must be true: nemo_kd works with Megatron-core models")
    kd = cfg.get("kd") or {}
    if kd.get("fused_lm_head") and cfg.get("defer_embedding_wgrad_compute"):
        raise NemoKDError(
            "model.defer_embedding_wgrad_compute=true with model.kd.fused_lm_head=true: it defers "
            "the weight's gradient of an LM head that runs separately; unset one of the two"
        )
    if cfg.get("context_parallel_size", 1) > 1:
        _refuse_with_context_parallelism(cfg)


def _refuse_with_context_parallelism(cfg: DictConfig) -> None:
    where = f"model.context_parallel_size={cfg.context_parallel_size}"
    if cfg.data.get("train_ds") and cfg.data.train_ds.get("packed_sequence", False):
        raise NemoKDError(
            f"model.data.train_ds.packed_sequence=true with {where} is not supported: the samples "
            "of a pack are not padded to lengths that can be split; unset one of the two"
        )
