"""Run the student's scripts, given Hydra's configuration: train, evaluate, merge adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.checkpoints.source import unpickles
from nemo_kd.errors import NemoKDError
from nemo_kd.files import commit
from nemo_kd.nemo import end_of_run, results_file, run_directory, start, start_of_run
from nemo_kd.nemo.base_of_adapters import BASE_KEY, absolute, check_base_of_adapters
from nemo_kd.nemo.config import (
    kd_training_config,
)
from nemo_kd.nemo.data_settings import check_data_settings
from nemo_kd.nemo.length import (
    check_evaluation,
    check_split_lengths,
    fit_length,
    refuse_part_epochs,
    validates,
)
from nemo_kd.nemo.peft import add_adapters, schemes_of
from nemo_kd.nemo.record import DATA_KEY, Progress, Record, asked, record_of
from nemo_kd.nemo.restored_adapters import settle_adapters
from nemo_kd.nemo.settings import training
from nemo_kd.nemo.settings.chosen import check_saved
from nemo_kd.nemo.settings.unused import unused
from nemo_kd.nemo.splits import Split, TrainSplit, splits_of
from nemo_kd.nemo.template import settle_template
from nemo_kd.settings import files
from nemo_kd.store import Store, StoreError
from nemo_kd.visible import say

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from nemo_kd.nemo.model import MegatronGPTSFTKDModel
    from nemo_kd.nemo.run_directory import RunDirectory


def run(cfg: DictConfig) -> None:
    """Train; write checkpoints, TensorBoard curves and `metrics.jsonl` to the run's directory.

    The same command resumes an interrupted run, and does nothing if the run is complete.
    """
    check_settings(cfg)
    for line in unused(cfg):
        say(line)
    refuse_part_epochs(cfg.trainer)
    start_of_run.check_manager(cfg.get("exp_manager"))
    check_saved(cfg)
    TrainSplit.of(cfg.model.data.train_ds).check_sources(kd_training_config(cfg.model.kd))
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    settings = asked(cfg)
    _prepare(cfg)
    directory = run_directory.find(cfg)
    done, then = start_of_run.what_is_done(directory)
    fit_length(cfg, done)
    record = record_of(cfg, settings)
    if directory is not None:
        if then is None:
            start_of_run.begin(directory)
        elif not start_of_run.resume(cfg, directory, done, then, record, raw):
            end_of_run.say_where(cfg, directory.student or directory.checkpoint, directory)
            return
    if notice := alpha_of_validation(cfg):
        say(notice)
    trainer = _started(cfg)
    with start_of_run.alone_in(directory):
        if _train(cfg, trainer, record, done, directory):
            end_of_run.say_where(cfg, end_of_run.written(trainer, directory), directory)


def alpha_of_validation(cfg: DictConfig) -> str:
    """Return a notice if `validation_loss` weights a store differently than the training; or ""."""
    kd = kd_training_config(cfg.model.kd)
    alpha = round(kd.end.weights[1], 9)  # an end of 0.1 is computed as 0.09999999999999998
    given = TrainSplit.of(cfg.model.data.train_ds).alphas(kd)
    if not validates(cfg) or all(one in (None, alpha) for one in given):
        return ""
    shown = ",".join("null" if one is None else str(one) for one in given)
    return (
        f"validation_loss has alpha={alpha}, that of model.kd, for every validation set, not "
        f"model.data.train_ds.alpha=[{shown}]; val/NAME/sft_loss and val/NAME/kd_loss depend on "
        "neither"
    )


def _train(
    cfg: DictConfig,
    trainer: Trainer,
    record: Record,
    done: Progress,
    directory: RunDirectory | None,
) -> bool:
    """Train the remaining steps; `done` is the progress of earlier starts.

    Return False if the time limit has ended this start.
    """
    from nemo.utils.exp_manager import exp_manager
    from nemo.utils.get_rank import is_global_rank_zero

    from nemo_kd.nemo.early_stopping import MonitorCheck, out_of_time
    from nemo_kd.nemo.metrics import StepMetrics
    from nemo_kd.nemo.resume import RunKeeper, note_steps, resume_exactly

    if done.step:  # TensorBoard leaves out points of steps that are trained again
        key = "exp_manager.summary_writer_kwargs.purge_step"
        OmegaConf.update(cfg, key, done.step, force_add=True)
    log_dir = exp_manager(trainer, cfg.exp_manager)
    validating = start_of_run.validates_first(cfg, done)
    resume_exactly(trainer, validate_first=validating)
    # Before NeMo's callbacks: the one that ends a run at SIGTERM prevents all later ones.
    keeper = RunKeeper(record, keep_first=directory is not None and directory.back is not None)
    trainer.callbacks.insert(0, keeper)
    if log_dir is not None and done.step and is_global_rank_zero():
        run_directory.keep_metrics(Path(log_dir), done.step, validated=not validating)
    file = None if log_dir is None else Path(log_dir) / run_directory.METRICS
    trainer.callbacks[:0] = [StepMetrics(file), MonitorCheck()]
    if not torch.cuda.is_available():
        _stop_on_sigterm(cfg, trainer)
    with open_dict(cfg):
        cfg.model[DATA_KEY] = record.train_stores
        if record.student and schemes_of(cfg):
            cfg.model[BASE_KEY] = absolute(record.student)
    model = _student(cfg, trainer)
    if done.step and (notice := start_of_run.dropout_notice(model.cfg)):
        say(notice)
    # To resume, Megatron-core 0.14 creates only objects of registered classes.
    with unpickles():
        trainer.fit(model)
    steps, ended = trainer.max_steps, keeper.ended
    if ended is None and out_of_time(trainer):
        say(
            f"stopped by exp_manager.max_time_per_run={cfg.exp_manager.max_time_per_run} at step "
            f"{trainer.global_step} of {steps}: run the same command to resume"
        )
        return False
    if ended is not None and ended.reason:
        say(f"stopped early at step {ended.step} of {steps}: {ended.reason}")
    student = directory.student if directory is not None else None
    if student and ended is None:  # there was nothing to do for Lightning
        note_steps(trainer, model)
        _restore_best(trainer)
        model.save_to(str(student))
    return True


def _restore_best(trainer: Trainer) -> None:
    """Load the best checkpoint, as NeMo does at a run's end with `save_best_model`."""
    callback: Any = trainer.checkpoint_callback
    if callback is None or not callback.save_best_model or not callback.best_model_path:
        return
    best = callback.best_model_path.removesuffix(".ckpt")
    path = best if Path(best).is_dir() else callback.best_model_path
    trainer._checkpoint_connector.restore(trainer.strategy.broadcast(path))


def _stop_on_sigterm(cfg: DictConfig, trainer: Trainer) -> None:
    """At SIGTERM, save after the current step and exit with status 0; NeMo does so on CUDA only."""
    from nemo.utils.callbacks.preemption import PreemptionCallback

    if trainer.checkpoint_callback is not None and cfg.exp_manager.get(
        "create_preemption_callback", True
    ):
        trainer.callbacks.append(PreemptionCallback(trainer.checkpoint_callback))


def evaluate(cfg: DictConfig) -> None:
    """Measure on `model.data.validation_ds`; print the results and write them to `output`."""
    check_settings(cfg)
    peft = cfg.model.peft
    if schemes_of(cfg) and not peft.restore_from_path:
        raise NemoKDError(
            f"model.peft.peft_scheme={peft.peft_scheme} without model.peft.restore_from_path would "
            "measure new, untrained adapters: set it to the trained ones (a .nemo), or "
            "model.peft.peft_scheme=none"
        )
    if not Split.of(cfg.model.data.validation_ds).sources:
        raise NemoKDError(
            "nothing to measure on: set model.data.validation_ds.store, or file_names (SFT files) "
            "for the losses without a teacher"
        )
    results_file.check_output(cfg)
    check_evaluation(cfg)
    _prepare(cfg)
    trainer = _started(cfg)
    trainer.validate(_student(cfg, trainer), verbose=False)
    results = measured(trainer.callback_metrics, cfg.model.data.validation_ds.metric.name)
    if torch.distributed.get_rank() == 0:
        for name, value in sorted(results.items()):
            print(f"{name:40} {value:.4f}")
        if cfg.get("output"):
            results_file.write(Path(cfg.output), results)


def measured(logged: Mapping[str, Any], metric: str | None) -> dict[str, float]:
    """Return the results of a validation: `NAME/...` of each set, and those of NeMo's `metric`.

    Errors: NemoKDError if there are none.
    """
    prefixes = {"val/": "val/"}  # what a name begins with → the part that the results leave out
    if metric not in (None, "loss"):
        prefixes[f"validation_{metric}"] = "validation_"
    results = {
        name.removeprefix(prefix): float(value)
        for name, value in logged.items()
        for beginning, prefix in prefixes.items()
        if name.startswith(beginning)
    }
    if not results:
        raise NemoKDError(
            "nothing was measured: no sample of model.data.validation_ds has an answer token; use "
            "a store with answers (nemo-kd show STORE 0 prints a sample)"
        )
    return results


def merge(cfg: DictConfig) -> None:
    """Add the LoRA adapters of `model.peft.restore_from_path` to the weights; save the model."""
    check_settings(cfg)
    peft = cfg.model.peft
    if not peft.restore_from_path:
        raise NemoKDError(
            "nothing to merge: set model.peft.restore_from_path to the adapters (a .nemo)"
        )
    if peft.peft_scheme != "lora":
        raise NemoKDError(
            f"model.peft.peft_scheme={peft.peft_scheme}: only the adapters of lora can be added "
            "to the weights of a model; use the others as they are"
        )
    if not cfg.get("output"):
        raise NemoKDError("output must be given: the merged model, a .nemo")
    results_file.check_path(cfg, files.new_file)
    _prepare(cfg)
    trainer = _started(cfg)
    model = _student(cfg, trainer)
    from nemo_kd.nemo.merge import merge_lora

    merged = merge_lora(model)
    output = Path(cfg.output)
    temporary = output.with_name(f".new.{output.name}")  # one name for all ranks
    model.save_to(str(temporary))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        commit(temporary, output)
        print(f"{cfg.output}: the complete model, with {merged} adapters merged on each rank")
        hf = output.with_name(f"{output.stem}-hf")
        print(f"for transformers: {end_of_run.export_command(output, hf)}")


def check_settings(cfg: DictConfig) -> None:
    """Check keys, values, paths and stores before the slow imports."""
    training.fill_in(cfg)
    training.check_keys(cfg)
    check_data_settings(cfg.model.data)
    TrainSplit.of(cfg.model.data.train_ds).alphas(kd_training_config(cfg.model.kd))
    start.refuse(cfg)
    schemes = schemes_of(cfg)
    training.check_inputs(cfg)
    check_split_lengths(cfg)
    settle_adapters(cfg, schemes)
    splits = splits_of(cfg.model.data)
    settle_template(cfg.model, {name: _stores(name, split) for name, split in splits.items()})
    training.check_templates(cfg)


def _stores(name: str, split: Split) -> list[Store]:
    try:
        return [Store(directory) for directory in split.store]
    except StoreError as error:
        raise StoreError(f"model.data.{name}.store: {error}") from error


def _prepare(cfg: DictConfig) -> None:
    """Adapt the configuration to this machine, and resolve its interpolations."""
    start.prepare(cfg)
    OmegaConf.resolve(cfg)


def _started(cfg: DictConfig) -> Trainer:
    """Return the trainer, with its process groups."""
    trainer = start.build_trainer(cfg)
    start.start_process_groups(cfg.model, trainer)
    return trainer


def _student(cfg: DictConfig, trainer: Trainer) -> MegatronGPTSFTKDModel:
    # Imported late: on a CPU, the patches must be installed before NeMo and Megatron.
    from nemo_kd.nemo.model import MegatronGPTSFTKDModel

    check_base_of_adapters(cfg)
    model = start.restore(cfg.model.restore_from_path, MegatronGPTSFTKDModel, cfg, trainer)
    add_adapters(cfg, model)
    return model
