"""The student's scripts after Hydra: train it on a store, measure it on held-out ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd import megatron
from nemo_kd.model.config import (
    check_train_data,
    kd_training_config,
    store_alphas,
    store_directories,
)
from nemo_kd.settings import files, training
from nemo_kd.store import Store, StoreError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from nemo_kd.model.gpt_sft_kd import MegatronGPTSFTKDModel


def run(cfg: DictConfig) -> None:
    """Train; leaves checkpoints, TensorBoard curves and `metrics.jsonl` in the run's directory."""
    check_settings(cfg)
    check_train_data(cfg.model.data.train_ds, kd_training_config(cfg.model.kd))
    _prepare(cfg)
    _fit_validation(cfg)
    from nemo.utils.exp_manager import exp_manager

    from nemo_kd.model.metrics import MetricsJsonl

    trainer = megatron.build_trainer(cfg)
    log_dir = exp_manager(trainer, cfg.exp_manager)
    if log_dir is not None:
        # Before NeMo's callbacks: the one that ends a run at SIGTERM leaves the others no step.
        trainer.callbacks.insert(0, MetricsJsonl(Path(log_dir) / "metrics.jsonl"))
    if not torch.cuda.is_available():
        _stop_on_sigterm(cfg, trainer)
    trainer.fit(_student(cfg, trainer))


def _stop_on_sigterm(cfg: DictConfig, trainer: Trainer) -> None:
    """SIGTERM saves after the step and ends with status 0: NeMo sets it up only where CUDA is."""
    from nemo.utils.callbacks.preemption import PreemptionCallback

    if trainer.checkpoint_callback is not None and cfg.exp_manager.get(
        "create_preemption_callback", True
    ):
        trainer.callbacks.append(PreemptionCallback(trainer.checkpoint_callback))


def evaluate(cfg: DictConfig) -> None:
    """Measure on `model.data.validation_ds.store`; prints the figures, writes them to `output`."""
    check_settings(cfg)
    if not cfg.model.data.validation_ds.store:
        raise StoreError("nothing to measure on: set model.data.validation_ds.store")
    files.check_files(cfg, [("output", files.output_file)])
    _prepare(cfg)
    trainer = megatron.build_trainer(cfg)
    trainer.validate(_student(cfg, trainer), verbose=False)
    figures = {
        name.removeprefix("val/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/")
    }
    if torch.distributed.get_rank() == 0:
        for name, value in sorted(figures.items()):
            print(f"{name:40} {value:.4f}")
        if cfg.get("output"):
            path = Path(cfg.output)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(figures, indent=1) + "\n")


def merge(cfg: DictConfig) -> None:
    """Add the LoRA adapters of `model.peft.restore_from_path` into the model; save it whole."""
    check_settings(cfg)
    peft = cfg.model.peft
    if peft.peft_scheme != "lora" or not peft.restore_from_path:
        raise ValueError(
            "nothing to merge: set model.peft.restore_from_path to the adapters (a .nemo), and "
            "model.peft.lora_tuning as they were trained"
        )
    if not cfg.get("output"):
        raise ValueError("output must be given: the merged model, a .nemo")
    files.check_files(cfg, [("output", files.new_file)])
    _prepare(cfg)
    trainer = megatron.build_trainer(cfg)
    model = _student(cfg, trainer)
    from nemo_kd.model.merge import merge_lora

    merged = merge_lora(model)
    model.save_to(cfg.output)
    if torch.distributed.get_rank() == 0:
        print(f"{cfg.output}: the whole model, {merged} adapters merged on each rank")


def check_settings(cfg: DictConfig) -> None:
    """Refuse keys, values, paths and stores that cannot work, before the slow imports."""
    training.fill_in(cfg)
    training.check_keys(cfg)
    store_alphas(cfg.model.data.train_ds, kd_training_config(cfg.model.kd))
    megatron.refuse(cfg)
    training.check_inputs(cfg)
    for split in training.SPLITS:
        for directory in store_directories(cfg.model.data[split]):
            try:
                Store(directory)
            except StoreError as error:
                raise StoreError(f"model.data.{split}.store: {error}") from error


def _prepare(cfg: DictConfig) -> None:
    """Fit the configuration to this machine."""
    megatron.prepare(cfg)
    OmegaConf.resolve(cfg)


def _fit_validation(cfg: DictConfig) -> None:
    """Validate at the end at the latest; without validation data, keep checkpoints all the same."""
    trainer, data = cfg.trainer, cfg.model.data.validation_ds
    if isinstance(trainer.val_check_interval, int):
        trainer.val_check_interval = min(trainer.val_check_interval, trainer.max_steps)
    if data.store or data.file_names:
        return
    trainer.limit_val_batches = 0
    if cfg.exp_manager is None:
        return
    # NeMo keeps checkpoints by a validation metric, of which there is none now.
    with open_dict(cfg):
        checkpoints = cfg.exp_manager.setdefault("checkpoint_callback_params", {})
        checkpoints.monitor = "reduced_train_loss"
        checkpoints.filename = (
            f"{cfg.name}--{{reduced_train_loss:.3f}}-{{step}}-{{consumed_samples}}"
        )
        checkpoints.every_n_epochs, checkpoints.every_n_train_steps = 0, trainer.val_check_interval


def _student(cfg: DictConfig, trainer: Trainer) -> MegatronGPTSFTKDModel:
    # Only now: on a CPU NeMo and Megatron must find their patches in place.
    from nemo_kd.model.gpt_sft_kd import MegatronGPTSFTKDModel
    from nemo_kd.model.peft import add_adapters

    megatron.start_process_groups(cfg.model, trainer)
    model = megatron.restore(cfg.model.restore_from_path, MegatronGPTSFTKDModel, cfg, trainer)
    add_adapters(cfg, model)
    return model
