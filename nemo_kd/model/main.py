"""`examples/train_gpt_sft_kd.py` after Hydra: from a configuration to a trained student."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_kd import megatron


def run(cfg: DictConfig) -> None:
    """Restore the student, train it, leave checkpoints, curves and `metrics.jsonl`."""
    megatron.prepare(cfg)
    # NeMo and Megatron only now: on a CPU they must find their patches in place.
    from nemo.utils.exp_manager import exp_manager

    from nemo_kd.model.gpt_sft_kd import MegatronGPTSFTKDModel
    from nemo_kd.model.metrics import MetricsJsonl

    OmegaConf.resolve(cfg)
    trainer = megatron.build_trainer(cfg)
    log_dir = exp_manager(trainer, cfg.exp_manager)
    if log_dir is not None:
        trainer.callbacks.append(MetricsJsonl(Path(log_dir) / "metrics.jsonl"))
    megatron.start_process_groups(cfg.model, trainer)
    model = megatron.restore(cfg.model.restore_from_path, MegatronGPTSFTKDModel, cfg, trainer)
    trainer.fit(model)
