"""The loss of a store in transformers' `Trainer` and classes derived from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_kd.errors import NemoKDError
from nemo_kd.hf.checks import (
    check_arguments,
    check_averaged,
    check_batches,
    check_data,
    check_each,
    check_steps,
)
from nemo_kd.hf.collator import TEACHER, mean
from nemo_kd.hf.evaluation import all_samples, not_empty, without_repeated
from nemo_kd.loss import KDConfig
from nemo_kd.loss.schedule import evaluation_config, training_config
from nemo_kd.teacher.processes import say_once

TERMS = ("loss", "sft_loss", "kd_loss", "answer_tokens")


class StoreLossMixin:
    """Mixin for a subclass of `transformers.Trainer` whose `data_collator` is a `StoreCollator`.

        class StoreTrainer(StoreLossMixin, transformers.Trainer): ...

    The loss of a step is the mean over the answer tokens of all its batches (gradient
    accumulation) and, with `average_tokens_across_devices=True`, of all processes. The loss of an
    evaluation is the mean over all of its answer tokens, each once, whatever `dataloader_drop_last`
    and the number of processes; the logs have `sft_loss` and `kd_loss` beside it, over all
    processes; NaN without answer tokens. The model gets neither labels nor teacher.

    A loss that is NaN or infinite is logged, and ends the training if it stays so; weights that
    are NaN or infinite are not saved.

    A `KDSchedule` follows the steps of the trainer. Evaluations have the settings of its end.
    Checkpoints keep the settings of the loss, the stores' fingerprints and the arguments that
    `Trainer` does not change on a resume, in `nemo_kd.json`.

    Errors: NemoKDError for a subclass whose bases have a Trainer before the mixin; on construction
    for another collator, for arguments that the loss cannot follow, for data sets with another loss
    than the collator's, for samples longer than the positions of a model that learns them, for a
    model with fewer logits than the stores' tokenizer has ids, for padding that changes a model's
    rotary frequencies and for a generation configuration that could not be saved; in the first step
    of several processes after an evaluation; on starting among the checkpoints of another training;
    on resuming a checkpoint of another loss, other stores, such arguments or adapters, or of
    weights alone. StoreError on construction if `processing_class` is another tokenizer than the
    one the stores record.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise NemoKDError for bases in an order in which Trainer's own loss would be trained."""
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(StoreLossMixin)]:
            if base.__module__ == "transformers.trainer":
                raise NemoKDError(
                    f"class {cls.__name__}: {base.__name__} comes before StoreLossMixin, so that "
                    f"its loss would be trained; write class {cls.__name__}(StoreLossMixin, ...)"
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts labels and does not divide
        self.label_names: list[str] = ["labels"]  # with adapters, Trainer does not find them
        self._sums = {"train": _Sums(), "eval": _Sums()}
        self._keeper: Any = None  # of the settings, while it trains
        self._finite: Any = None  # the callback that reads the losses, while it trains
        check_arguments(self)
        check_data(self)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume a checkpoint of the same settings; as `Trainer.train`.

        Of a training whose steps are all done, the checkpoint is loaded, and nothing is trained.
        """
        from nemo_kd.hf.checkpoints import chosen, move_later
        from nemo_kd.hf.finite import FiniteLoss
        from nemo_kd.hf.resume import SettingsKeeper, check_resumed, check_start, settings_of

        trainer: Any = self
        parent: Any = super()
        check_steps(trainer.args)
        settings = settings_of(
            trainer.data_collator, trainer.train_dataset, trainer.args, trainer.model
        )
        given = kwargs.pop("model_path", resume_from_checkpoint)  # its name of earlier versions
        checkpoint = chosen(given, trainer.args.output_dir)
        if checkpoint is None:
            check_start(trainer.args)
            if given is True:
                say_once([f"{trainer.args.output_dir} has no checkpoint: starting at step 0"])
                given = None
        else:
            check_resumed(checkpoint, settings)
            move_later(checkpoint, trainer.args, trainer.accelerator.wait_for_everyone)
            given = str(checkpoint)
        self._keeper = SettingsKeeper(settings, checkpoint)
        self._finite = FiniteLoss(trainer)
        for callback in (self._keeper, self._finite):
            trainer.remove_callback(type(callback))
            trainer.add_callback(callback)
        return parent.train(given, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step, none after the last one; Trainer calls it.

        Trainer itself looks at the number of steps only after one.
        """
        parent: Any = super()
        if self._keeper is not None and self._keeper.is_complete:
            return [], None
        return parent.get_batch_samples(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the batches of the training; Trainer calls it.

        Errors: NemoKDError if there are none.
        """
        trainer: Any = self
        parent: Any = super()
        not_empty(trainer.train_dataset, "train_dataset")
        loader = parent.get_train_dataloader()
        check_batches(loader, trainer)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation, of a data set with the same loss; Trainer calls it.

        Errors: NemoKDError and StoreError as on construction, NemoKDError without samples.
        """
        trainer: Any = self
        parent: Any = super()
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            check_each(self, {"eval_dataset": eval_dataset})
        with all_samples(trainer.args):
            return not_empty(parent.get_eval_dataloader(eval_dataset), "eval_dataset")

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the batches of a prediction, of a data set with the same loss; Trainer calls it.

        Errors: NemoKDError and StoreError as on construction, NemoKDError without samples.
        """
        trainer: Any = self
        parent: Any = super()
        check_each(self, {"test_dataset": test_dataset})
        with all_samples(trainer.args):
            return not_empty(parent.get_test_dataloader(test_dataset), "test_dataset")

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model; Trainer calls it for each checkpoint.

        Errors: NemoKDError for trained weights that are NaN or infinite.
        """
        from nemo_kd.hf.finite import refuse_weights_not_finite

        trainer: Any = self
        parent: Any = super()
        refuse_weights_not_finite(trainer.model)
        parent.save_model(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and with `return_outputs` the model's outputs; Trainer calls it."""
        trainer: Any = self
        check_averaged(trainer, model)
        shown = {name: x for name, x in inputs.items() if name not in (TEACHER, "labels")}
        outputs = model(**shown)
        config = self._config(training=model.training)
        if not model.training:
            inputs = without_repeated(inputs, trainer.accelerator)
        sums = trainer.data_collator.sums(outputs.logits, inputs, config=config)
        self._sums["train" if model.training else "eval"].add(sums)
        if model.training and self._finite is not None:
            self._finite.add(trainer.state.global_step + 1, sums["loss"])
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
        """Log with the means of `sft_loss` and `kd_loss` since the last time; Trainer calls it.

        They are means over answer tokens; `loss` remains Trainer's mean of the steps' losses.
        Trainer may leave a loss out that is not finite, or repeat it at all later steps.
        """
        parent: Any = super()
        if "loss" in logs:
            means = self._sums["train"].means(self)
            both = means["loss"], logs["loss"]
            own = {} if all(map(math.isfinite, both)) else {"loss": means["loss"]}
            logs = {**logs, **own, **{name: means[name] for name in ("sft_loss", "kd_loss")}}
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


class _Sums:
    """Sums of the loss's terms over answer tokens, kept on the device."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, sums: Mapping[str, Tensor]) -> None:
        exact = torch.float32 if sums["loss"].device.type == "mps" else torch.float64
        values = torch.stack([sums[name].detach().to(exact) for name in TERMS])
        self.total = values if self.total is None else self.total + values

    def means(self, trainer: Any) -> dict[str, float]:
        """Means over the answer tokens of all processes since the last call; collective.

        NaN without answer tokens: 0 would be the best loss.
        """
        if self.total is None:
            raise NemoKDError(
                f"the loss of the store was not computed: {type(trainer).__name__}.compute_loss "
                "must call that of StoreLossMixin, by super()"
            )
        *sums, count = trainer.accelerator.reduce(self.total, "sum").tolist()
        self.total = None
        pairs = zip(TERMS, sums, strict=False)
        return {name: value / count if count else math.nan for name, value in pairs}
