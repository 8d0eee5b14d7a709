"""Run a distillation in Megatron-Bridge's own training loop."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.pretrain import pretrain

from nemo_kd.bridge.data import KDDataConfig
from nemo_kd.bridge.peft import described, keep_student
from nemo_kd.bridge.recipe import evaluation_of
from nemo_kd.bridge.step import KDForwardStep
from nemo_kd.checkpoints.latest import latest
from nemo_kd.errors import NemoKDError
from nemo_kd.files import sha256_of_json
from nemo_kd.loss import KDConfig
from nemo_kd.mcore.cuda_graphs import refuse_full_iteration
from nemo_kd.mcore.mix import EARLIER, STUDENT
from nemo_kd.mcore.multi_token import refuse_multi_token
from nemo_kd.mcore.resume import keep_settings
from nemo_kd.store.fingerprint import checkpoint_fingerprint, earlier_fingerprint
from nemo_kd.teacher.processes import say_once

WEIGHTS = (".safetensors", ".bin")
"""Ends of the names of files with weights in a Hugging Face directory."""


def finetune(
    config: ConfigContainer,
    kd: KDConfig,
    *,
    callbacks: Any = None,
    allow: Collection[str] = (),
) -> None:
    """Train by Bridge's `pretrain`, with the loss `kd` on the sources of `config.dataset`.

    With `config.peft` only adapters are trained, on the student's weights; see `export_merged`.
    Without `eval_iters` (of `validation`, or of `train` before Bridge 0.4) an evaluation contains
    each item of the validation data once.
    `kd`: a `KDConfig` or `KDSchedule`. `callbacks`: as of `pretrain`, with a version that has them.
    `allow`: names of settings of data, loss, adapters and student in which a continued training may
    differ from its checkpoint. A training whose checkpoint has all steps ends with a line.

    Errors: NemoKDError for settings that do not fit each other, StoreError for a store that does
    not fit the student or the loss.
    """
    data: Any = config.dataset
    _check(config)
    data.check(kd)
    checkpoint = config.checkpoint
    keep_settings(
        data.training_data(),
        kd,
        save=checkpoint.save,
        load=checkpoint.load,
        allow=allow,
        more={"peft": described(config.peft), **_student(data)},
        steps=config.train.train_iters,
    )
    if _is_complete(config):
        return
    _complete(config)
    keep_student(config)
    more = {} if callbacks is None else {"callbacks": callbacks}
    pretrain(config, KDForwardStep(kd, data.vocab_size()), **more)


def _check(config: ConfigContainer) -> None:
    data = config.dataset
    if not isinstance(data, KDDataConfig):
        raise NemoKDError(
            f"dataset is a {type(data).__name__}, which has no teacher; set it to a KDDataConfig"
        )
    refuse_multi_token(config.model, "model.mtp_num_layers")
    refuse_full_iteration(config.model, lambda name: f"model.{name}")
    if getattr(config.dist, "use_decentralized_pg", False):
        raise NemoKDError(
            "dist.use_decentralized_pg=True leaves megatron.core.parallel_state empty, from which "
            "the loss and the data take their process groups; set it to False"
        )
    if data.seq_length != config.model.seq_length:
        raise NemoKDError(
            f"dataset.seq_length={data.seq_length}, but model.seq_length="
            f"{config.model.seq_length}; set both alike"
        )
    if config.mixed_precision is not None and not torch.cuda.is_available():
        raise NemoKDError(
            f"mixed_precision={config.mixed_precision}: Megatron's optimizer for half precision "
            "needs a GPU; without one give finetune_config precision=None, for float32"
        )
    if data.packed and config.train.micro_batch_size != 1:
        raise NemoKDError(
            f"train.micro_batch_size={config.train.micro_batch_size} with dataset.packed: a pack "
            "is a micro-batch; set it to 1"
        )
    if data.packed and config.model.context_parallel_size > 1:
        raise NemoKDError(
            f"model.context_parallel_size={config.model.context_parallel_size} with "
            "dataset.packed is not supported: set it to 1, or packed to False"
        )


def _student(data: Any) -> dict[str, Any]:
    """Return what a continued training compares of the student; {} if it is not known."""
    if data.student is None:
        return {}
    files = [  # not all: the directory may hold the run itself
        file
        for file in Path(data.student).iterdir()
        if file.suffix in WEIGHTS or file.name == "config.json"
    ]
    now = sha256_of_json({file.name: checkpoint_fingerprint(file) for file in files})
    earlier = sha256_of_json({file.name: earlier_fingerprint(file) for file in files})
    return {STUDENT: {"path": str(data.student), "fingerprint": now, EARLIER: earlier}}


def _is_complete(config: ConfigContainer) -> bool:
    """Whether the checkpoint to continue has all steps; Bridge would end in an assertion."""
    checkpoint, steps = config.checkpoint, config.train.train_iters
    if checkpoint.load is None or checkpoint.finetune or steps is None:
        return False
    text = str(checkpoint.ckpt_step or latest(checkpoint.load))
    if not text.isdigit() or int(text) < steps:
        return False
    say_once(
        [f"nothing to train: {checkpoint.load} has iteration {text}, and train.train_iters={steps}"]
    )
    return True


def _complete(config: ConfigContainer) -> None:
    """Set the number of evaluation steps, and the number of items of an evaluation."""
    data: Any = config.dataset
    evaluation, train = evaluation_of(config), config.train
    batch = getattr(evaluation, "eval_global_batch_size", None) or train.global_batch_size
    steps = 0
    if data.valid:
        steps = train.eval_iters or evaluation.eval_iters
        steps = steps or -(-len(data.validation_data()) // batch)
        data.samples_per_evaluation = steps * batch
    evaluation.eval_iters = steps
    if train.eval_iters is not None:  # Bridge 0.4 and later would prefer it
        train.eval_iters = steps
