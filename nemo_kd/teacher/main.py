"""`examples/dump_teacher_topk.py` after Hydra: from a configuration to a store."""

from __future__ import annotations

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd import megatron
from nemo_kd.store import StoreSpec
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.spec import MAX_VOCABULARY


def run(cfg: DictConfig) -> None:
    """Restore the teacher, dump, and say what the store holds."""
    check_store_settings(cfg)
    megatron.prepare(cfg)
    # NeMo and Megatron only now: on a CPU they must find their patches in place.
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    from nemo_kd.teacher.dump import dump

    _complete(cfg)
    trainer = megatron.build_trainer(cfg)
    megatron.start_process_groups(cfg.model, trainer)
    model = megatron.restore(cfg.model.restore_from_path, MegatronGPTSFTModel, cfg, trainer)
    model.freeze()
    manifest = dump(cfg, model.to(torch.cuda.current_device()))
    if manifest is not None and torch.distributed.get_rank() == 0:
        totals = manifest.totals
        each = totals["bytes"] / max(totals["answer_tokens"], 1)
        print(
            f"{cfg.output_dir}: {totals['samples']} samples, {totals['answer_tokens']} answer "
            f"tokens, {totals['bytes'] / 1e6:.1f} MB ({each:.0f} bytes a token)"
        )


def check_store_settings(cfg: DictConfig) -> None:
    """Refuse what no store can hold before the teacher is loaded, which may take minutes."""
    kd = cfg.model.kd
    spec = StoreSpec(
        top_k=kd.top_k,
        vocab_size=MAX_VOCABULARY,  # the teacher's is not known yet
        temperatures=tuple(kd.temperatures),
        rows_per_shard=cfg.rows_per_shard,
        profile=kd.profile,
        profile_options=dict(kd.profile_options),
    )
    codec_of(spec)


def _complete(cfg: DictConfig) -> None:
    """What NeMo's model asks of a configuration and a dump has no use for."""
    model_parallel = cfg.model.tensor_model_parallel_size * cfg.model.pipeline_model_parallel_size
    replicas = max(cfg.trainer.devices * cfg.trainer.num_nodes // model_parallel, 1)
    with open_dict(cfg):
        cfg.model.global_batch_size = cfg.model.micro_batch_size * replicas
        cfg.model.optim = {"name": "adamw" if cfg.trainer.accelerator == "cpu" else "fused_adam"}
        cfg.model.gradient_as_bucket_view = False
        loss = {"metric": {"name": "loss"}}
        data = {"chat": cfg.data.chat, "validation_ds": loss, "test_ds": loss}
        cfg.model.data = OmegaConf.create(data)
        cfg.exp_manager = None
