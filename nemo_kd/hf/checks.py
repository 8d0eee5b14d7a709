"""Refuse a trainer's arguments, data sets and models that the loss of a store cannot follow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nemo_kd.errors import NemoKDError
from nemo_kd.hf.collator import StoreCollator
from nemo_kd.hf.columns import refuse_fewer_columns, warn_of_columns
from nemo_kd.hf.dataset import check_tokenizer, datasets_in
from nemo_kd.hf.evaluation import is_empty
from nemo_kd.hf.generation import generation_fault
from nemo_kd.hf.positions import learned_positions
from nemo_kd.hf.rope import LengthDependentRope
from nemo_kd.loss import KDConfig, KDSchedule
from nemo_kd.loss.schedule import evaluation_config

REFUSED = {
    "label_smoothing_factor": "the loss has no label smoothing",
    "packing": "samples are not packed",
    "padding_free": "samples are not packed",
    "use_legacy_prediction_loop": "it evaluates a mean over batches, not over answer tokens",
    "use_liger_kernel": "the loss needs the logits",
}
"""Arguments of trainers that the loss, its batches or its evaluation cannot follow."""


def check_steps(args: Any) -> None:
    """Raise NemoKDError for a number of steps or epochs of 0."""
    if args.max_steps == 0:
        raise NemoKDError(
            f"max_steps=0: Trainer would train num_train_epochs={args.num_train_epochs} instead; "
            "set max_steps to at least 1, or to -1 for epochs"
        )
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise NemoKDError(
            f"num_train_epochs={args.num_train_epochs}: nothing would be trained; set it above 0"
        )


def check_batches(loader: Any, trainer: Any) -> None:
    """Raise NemoKDError if `dataloader_drop_last` leaves no batch of a training."""
    if is_empty(loader):
        size = trainer.args.train_batch_size
        raise NemoKDError(
            f"train_dataset has {len(trainer.train_dataset)} samples, too few for a batch of "
            f"{size} on {trainer.args.world_size} processes, and dataloader_drop_last=True drops "
            "smaller ones: nothing would be trained; set a smaller per_device_train_batch_size, or "
            "dataloader_drop_last=False"
        )


def check_averaged(trainer: Any, model: Any) -> None:
    """Raise NemoKDError if several processes train copies of the model that drift apart."""
    several = trainer.accelerator.distributed_type.value.startswith("MULTI_")
    if model.training and several and model is trainer.model:
        raise NemoKDError(
            "the gradients of the processes are not averaged, because accelerate does not wrap a "
            "model that was evaluated before: evaluate after training, or set eval_on_start=True"
        )


def check_arguments(trainer: Any) -> None:
    """Raise NemoKDError for what the loss cannot follow; warn of uneven weights of tokens."""
    args, collator = trainer.args, trainer.data_collator
    if not isinstance(collator, StoreCollator):
        raise NemoKDError(
            f"data_collator is a {type(collator).__name__}; expected a StoreCollator, which pads "
            "the teacher's rows beside the tokens"
        )
    for name, reason in REFUSED.items():
        if getattr(args, name, None):
            raise NemoKDError(f"{name}={getattr(args, name)}: {reason}; leave it at its default")
    if trainer.compute_loss_func is not None:
        raise NemoKDError("compute_loss_func would not be called: leave it out")
    if getattr(trainer.model.config, "output_router_logits", False):
        raise NemoKDError(
            "model.config.output_router_logits=True: the experts' balance loss would not be added; "
            "set it to False"
        )
    if fault := generation_fault(trainer.model):
        raise NemoKDError(
            f"model.generation_config could not be saved at the end: {fault}; correct it, or set "
            "model.generation_config.do_sample=True if answers are to be sampled"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        warnings.warn(
            "average_tokens_across_devices=False: each process divides by its own answer tokens, "
            "so that tokens in short answers weigh more; set it to True",
            stacklevel=4,
        )


def check_data(trainer: Any) -> None:
    """Check the data sets that the trainer is constructed with."""
    given = trainer.eval_dataset
    evaluated = {"eval_dataset": given}
    if isinstance(given, Mapping):
        evaluated = {f"eval_dataset[{name!r}]": one for name, one in given.items()}
    longest = check_each(trainer, {"train_dataset": trainer.train_dataset, **evaluated})
    _warn_of_max_length(getattr(trainer.args, "max_length", None), longest)
    _warn_of_chat_template(trainer)
    collator = trainer.data_collator
    refuse_fewer_columns(trainer.model, collator.vocab_size)
    compared = [collator, *datasets_in(trainer.train_dataset)]
    if not (_tokenizer_to_compare(trainer) or any(one.compares_tokenizer for one in compared)):
        warn_of_columns(trainer.model, collator.vocab_size)


def _tokenizer_to_compare(trainer: Any) -> Any:
    """Return the trainer's tokenizer, if it has one and the stores record theirs; else None."""
    from transformers import PreTrainedTokenizerBase

    given, stores = trainer.processing_class, trainer.data_collator.stores
    known = any(store.spec.tokenizer.get("fingerprint") is not None for store in stores)
    return given if known and isinstance(given, PreTrainedTokenizerBase) else None


def check_each(trainer: Any, named: Mapping[str, Any]) -> int:
    """Compare losses, tokenizers and longest samples of data sets with the trainer's.

    Returns the number of tokens of the longest sample.
    """
    from transformers import PreTrainedTokenizerBase

    collator, longest = trainer.data_collator, 0
    fingerprint = collator.stores[0].spec.tokenizer.get("fingerprint")
    stores = [*collator.stores]
    for name, given in named.items():
        for one in datasets_in(given):
            _check_config(name, one.config, collator.config)
            for store in one.stores:
                store.check(tokenizer_fingerprint=fingerprint)
            stores += one.stores
            longest = max(longest, one.longest)
    if isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        known = [store for store in stores if store.spec.tokenizer.get("fingerprint") is not None]
        check_tokenizer(known, trainer.processing_class)
    _check_positions(trainer, longest)
    return longest


def _warn_of_chat_template(trainer: Any) -> None:
    """Warn of a tokenizer, saved with the student, with another chat template than the rows had."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = trainer.processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    templates = (one.chat_template for one in datasets_in(trainer.train_dataset))
    if any(isinstance(each, str) and each != tokenizer.chat_template for each in templates):
        warnings.warn(
            "processing_class has another chat_template than the stores' rows, and is saved with "
            "the student: set its chat_template to that of the StoreDataset",
            stacklevel=4,
        )


def _check_config(data: str, given: KDConfig, used: KDConfig) -> None:
    """Raise NemoKDError if a data set's settings of the loss are not those that are computed."""
    if data != "train_dataset":
        given, used = evaluation_config(given), evaluation_config(used)
    own, computed = _settings(given), _settings(used)
    changed = [name for name in own if own[name] != computed[name]]
    differing = [f"{name}={own[name]} instead of {computed[name]}" for name in changed]
    if differing:
        raise NemoKDError(
            f"{data} has another config than the data set of the data_collator, whose loss is "
            f"computed: {', '.join(differing)}; make both with the same config"
        )


def _settings(config: KDConfig) -> dict[str, Any]:
    """Return the settings, with the weights of the terms in the one form that all have."""
    found = {one.name: getattr(config, one.name, one.default) for one in fields(KDSchedule)}
    for name in ("alpha", "sft_weight", "kd_weight"):
        del found[name]
    return {"weights": config.weights, **found}


def _check_positions(trainer: Any, longest: int) -> None:
    """Raise NemoKDError for batches with more positions than the model has embeddings for."""
    positions, pad_to = learned_positions(trainer.model), trainer.data_collator.pad_to
    _check_rope(LengthDependentRope(trainer.model).limit, longest, pad_to)
    if positions is None:
        return
    if longest > positions:
        raise NemoKDError(
            f"the longest sample has {longest} tokens, but the model only {positions} positions: "
            f"give StoreDataset max_seq_length={positions} and over_long='truncate' or 'drop'"
        )
    if pad_to is not None and pad_to > positions:
        raise NemoKDError(
            f"pad_to={pad_to}, but the model has only {positions} positions: give StoreCollator "
            f"pad_to={positions} or less"
        )


def _check_rope(limit: int | None, longest: int, pad_to: int | None) -> None:
    """Check batches of a model whose rotary frequencies are others above `limit` positions."""
    if limit is None:
        return
    if longest > limit:
        warnings.warn(
            f"the longest sample has {longest} tokens, and above {limit} the model has other "
            "rotary frequencies, for all samples of a batch: a shorter sample's loss depends on "
            "those beside it. Give StoreDataset a lower max_seq_length, or set a batch size of 1",
            stacklevel=5,
        )
    elif pad_to is not None and pad_to > limit:
        raise NemoKDError(
            f"pad_to={pad_to}, but above {limit} positions the model has other rotary frequencies, "
            f"which no sample needs: give StoreCollator pad_to={limit} or less"
        )


def _warn_of_max_length(max_length: int | None, longest: int) -> None:
    """Warn of longer samples than TRL's `max_length`, which limits only rows that it prepares."""
    if max_length is not None and longest > max_length:
        warnings.warn(
            f"max_length={max_length} has no effect, and the longest sample has {longest} tokens: "
            f"give StoreDataset max_seq_length={max_length} and over_long='truncate' or 'drop', or "
            "set max_length=None",
            stacklevel=4,
        )
