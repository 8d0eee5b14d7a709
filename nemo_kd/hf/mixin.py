"""The loss of a store in transformers' `Trainer` and classes derived from it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from nemo_kd.errors import NemoKDError
from nemo_kd.hf.collator import TEACHER, StoreCollator, mean
from nemo_kd.hf.dataset import check_tokenizer, datasets_in
from nemo_kd.hf.generation import generation_fault
from nemo_kd.hf.positions import learned_positions
from nemo_kd.hf.rope import LengthDependentRope
from nemo_kd.loss import KDConfig, KDSchedule
from nemo_kd.loss.schedule import evaluation_config, training_config

TERMS = ("loss", "sft_loss", "kd_loss", "answer_tokens")
REFUSED = {
    "label_smoothing_factor": "the loss has no label smoothing",
    "packing": "samples are not packed",
    "padding_free": "samples are not packed",
    "use_legacy_prediction_loop": "it evaluates a mean over batches, not over answer tokens",
    "use_liger_kernel": "the loss needs the logits",
}
"""Arguments of trainers that the loss, its batches or its evaluation cannot follow."""


class StoreLossMixin:
    """Mixin for a subclass of `transformers.Trainer` whose `data_collator` is a `StoreCollator`.

        class StoreTrainer(StoreLossMixin, transformers.Trainer): ...

    The loss of a step is the mean over the answer tokens of all its batches (gradient
    accumulation) and, with `average_tokens_across_devices=True`, of all processes. The loss of an
    evaluation is the mean over all of its answer tokens; the logs have `sft_loss` and `kd_loss`
    beside it, over all processes. The model gets neither labels nor teacher.

    A `KDSchedule` follows the steps of the trainer. Evaluations have the settings of its end.
    Checkpoints keep the settings of the loss, the stores' fingerprints and the arguments that
    `Trainer` does not change on a resume, in `nemo_kd.json`.

    Errors: NemoKDError on construction for another collator, for arguments that the loss cannot
    follow, for data sets with another loss than the collator's, for samples longer than the
    positions of a model that learns them, for padding that changes a model's rotary frequencies and
    for a generation configuration that could not be saved; in the first step of several processes
    after an evaluation; on starting among the checkpoints of another training; on resuming a
    checkpoint of another loss, other stores, such arguments or adapters, or of weights alone.
    StoreError on construction if `processing_class` is another tokenizer than the one the stores
    record.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts labels and does not divide
        self.label_names: list[str] = ["labels"]  # with adapters, Trainer does not find them
        self._sums = {"train": _Sums(), "eval": _Sums()}
        self._keeper: Any = None  # of the settings, while it trains
        _check(self)
        _check_data(self)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume a checkpoint of the same settings; as `Trainer.train`.

        Of a training whose steps are all done, the checkpoint is loaded, and nothing is trained.
        """
        from nemo_kd.hf.resume import SettingsKeeper, check_resumed, check_start, settings_of

        trainer: Any = self
        parent: Any = super()
        settings = settings_of(
            trainer.data_collator, trainer.train_dataset, trainer.args, trainer.model
        )
        resumed = kwargs.get("model_path", resume_from_checkpoint)  # its name of earlier versions
        checkpoint = check_resumed(resumed, trainer.args.output_dir, settings)
        if checkpoint is None:
            check_start(trainer.args)
        self._keeper = SettingsKeeper(settings, checkpoint)
        trainer.remove_callback(SettingsKeeper)
        trainer.add_callback(self._keeper)
        return parent.train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step, none after the last one; Trainer calls it.

        Trainer itself looks at the number of steps only after one.
        """
        parent: Any = super()
        if self._keeper is not None and self._keeper.is_complete:
            return [], None
        return parent.get_batch_samples(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation, of a data set with the same loss; Trainer calls it.

        Errors: NemoKDError and StoreError as on construction.
        """
        parent: Any = super()
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            _check_each(self, {"eval_dataset": eval_dataset})
        return parent.get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the batches of a prediction, of a data set with the same loss; Trainer calls it.

        Errors: NemoKDError and StoreError as on construction.
        """
        parent: Any = super()
        _check_each(self, {"test_dataset": test_dataset})
        return parent.get_test_dataloader(test_dataset)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and with `return_outputs` the model's outputs; Trainer calls it."""
        trainer: Any = self
        _check_averaged(trainer, model)
        shown = {name: x for name, x in inputs.items() if name not in (TEACHER, "labels")}
        outputs = model(**shown)
        config = self._config(training=model.training)
        sums = trainer.data_collator.sums(outputs.logits, inputs, config=config)
        self._sums["train" if model.training else "eval"].add(sums)
        loss = mean(sums, num_items_in_batch)
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * trainer.accelerator.num_processes  # whose gradients are averaged
        return (loss, outputs) if return_outputs else loss

    def _config(self, *, training: bool) -> KDConfig:
        trainer: Any = self
        config, state = trainer.data_collator.config, trainer.state
        if not training:
            return evaluation_config(config)
        return training_config(config, state.global_step, state.max_steps)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the means of `sft_loss` and `kd_loss` since the last time; Trainer calls it."""
        parent: Any = super()
        if "loss" in logs:
            means = self._sums["train"].means(self)
            logs = {**logs, **{name: means[name] for name in ("sft_loss", "kd_loss")}}
        parent.log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with means over answer tokens instead of over batches; Trainer calls it."""
        parent: Any = super()
        self._sums["eval"] = _Sums()
        output = parent.evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if f"{prefix}_loss" in output.metrics:
            means = self._sums["eval"].means(self)
            output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output


def _check_averaged(trainer: Any, model: Any) -> None:
    """Raise NemoKDError if several processes train copies of the model that drift apart."""
    several = trainer.accelerator.distributed_type.value.startswith("MULTI_")
    if model.training and several and model is trainer.model:
        raise NemoKDError(
            "the gradients of the processes are not averaged, because accelerate does not wrap a "
            "model that was evaluated before: evaluate after training, or set eval_on_start=True"
        )


class _Sums:
    """Sums of the loss's terms over answer tokens, kept on the device."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, sums: Mapping[str, Tensor]) -> None:
        exact = torch.float32 if sums["loss"].device.type == "mps" else torch.float64
        values = torch.stack([sums[name].detach().to(exact) for name in TERMS])
        self.total = values if self.total is None else self.total + values

    def means(self, trainer: Any) -> dict[str, float]:
        """Means over the answer tokens of all processes since the last call; collective."""
        assert self.total is not None
        *sums, count = trainer.accelerator.reduce(self.total, "sum").tolist()
        self.total = None
        return {name: value / max(count, 1) for name, value in zip(TERMS, sums, strict=False)}


def _check(trainer: Any) -> None:
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


def _check_data(trainer: Any) -> None:
    """Check the data sets that the trainer is constructed with."""
    given = trainer.eval_dataset
    evaluated = {"eval_dataset": given}
    if isinstance(given, Mapping):
        evaluated = {f"eval_dataset[{name!r}]": one for name, one in given.items()}
    longest = _check_each(trainer, {"train_dataset": trainer.train_dataset, **evaluated})
    _warn_of_max_length(getattr(trainer.args, "max_length", None), longest)


def _check_each(trainer: Any, named: Mapping[str, Any]) -> int:
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
