"""The training command again in the directory of a run that is over: what it says and touches.

Run as `second_runs.py RUN WORK OUT.json OVERRIDE...` in a process of its own. None of the commands
gets as far as a model. OUT.json: "cases": name → {"said": lines, "error": text or null, "touched":
files}; "lr": what NeMo's schedule has for the steps of the longer run of the test.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_kd.files import sha256_of
from nemo_kd.nemo.train import run
from tests.configuration import configuration

LONGER_STEPS, LONGER_LR = 9, 0.02


def files(directory: Path) -> dict[str, int]:
    return {
        str(path.relative_to(directory)): path.stat().st_mtime_ns
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def again(directory: Path, overrides: list[str]) -> dict[str, Any]:
    """One command; how it ends must be before the training."""
    cfg = configuration("train_gpt_sft_kd", *overrides)
    before, error = files(directory), None
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            run(cfg)
        except ValueError as refused:
            error = str(refused)
    touched = sorted(set(before.items()) ^ set(files(directory).items()))
    return {"said": said.getvalue().splitlines(), "error": error, "touched": touched}


def last(directory: Path) -> Path:
    (checkpoint,) = (directory / "checkpoints").glob("*-last")
    return checkpoint


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Of what a checkpoint holds beside its tensors."""
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    change(common)
    torch.save(common, checkpoint / "common.pt")


def without_checkpoints(directory: Path) -> None:
    for checkpoint in (directory / "checkpoints").glob("*=*"):
        shutil.rmtree(checkpoint)


def earlier_beside_it(directory: Path) -> None:
    """As a kill leaves it between the save of a checkpoint and the removal of the one before."""
    earlier = directory / "checkpoints/gpt_sft_kd--validation_loss=1.000-step=3-last"
    shutil.copytree(last(directory), earlier)
    edit(earlier, lambda common: common.update(global_step=3))


def trained_on_files(rows: Path, directory: Path) -> None:
    """As if the run had been SFT without a store."""

    def change(common: dict[str, Any]) -> None:
        kept = common["nemo_kd"]
        kept["train_stores"] = [{"path": str(rows), "fingerprint": sha256_of(rows)}]
        kept["settings"]["model"]["kd"]["alpha"] = 0
        kept["settings"]["model"]["data"]["train_ds"]["format"] = "auto"  # without a store's

    edit(last(directory), change)


STOPPED = {"wait_count": 2, "patience": 2, "stopped_epoch": 0, "best_score": torch.tensor(1.0)}


def stopped_early(directory: Path, *, recorded: bool = True) -> None:
    """As if the run had had 40 steps and early stopping had ended it at step 6.

    `recorded`: by this package; otherwise only in Lightning's state of the callback.
    """

    def change(common: dict[str, Any]) -> None:
        kept = common["nemo_kd"]
        kept["max_steps"] = 40
        kept["settings"]["exp_manager"]["create_early_stopping_callback"] = True
        kept.pop("stopped_early")
        if recorded:
            kept["stopped_early"] = "val_loss is nan"
        common["callbacks"]["EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}"] = STOPPED

    edit(last(directory), change)


def main(source: Path, work: Path, out: Path, overrides: list[str]) -> None:
    results: dict[str, Any] = {}

    def case(name: str, *more: str, prepare: Callable[[Path], None] = lambda copy: None) -> None:
        copy = work / name
        shutil.copytree(source, copy)
        prepare(copy)
        results[name] = again(copy, [*overrides, f"exp_manager.explicit_log_dir={copy}", *more])

    other = "model.restore_from_path=" + str(source / "checkpoints/gpt_sft_kd.nemo")
    changed = ["model.kd.alpha=0.5", "model.optim.lr=0.005", "model.global_batch_size=2"]
    case("same")
    case("free", "trainer.log_every_n_steps=5", "model.data.train_ds.num_workers=1",
         "trainer.val_check_interval=2", "model.data.validation_ds.store=null",
         "model.data.validation_ds.names=null",
         "model.tensor_model_parallel_size=1", "model.kd.alpha=0.9")  # fmt: skip
    case("changed", *changed, "++model.layernorm_epsilon=0.5")
    case("student", other, "resume.allow=[model.restore_from_path]")
    case("partly_allowed", *changed, "resume.allow=[model.optim,model.kd.*]")
    case("unknown_allowed", "resume.allow=[model.optim.lrr]")
    case("shorter", "trainer.max_steps=4")
    case("anew", prepare=without_checkpoints)
    case("not_resumed", "exp_manager.resume_if_exists=false")
    torchs = ["model.optim.sched.name=ExponentialLR", "model.optim.sched.gamma=0.9"]
    torchs.append("~model.optim.sched.warmup_steps")  # which it does not take
    case("torch_schedule", *torchs, "resume.allow=[model.optim]")
    rows = Path(overrides[0].partition("=")[2]).parent / "train.jsonl"
    files_alone = ["model.data.train_ds.store=null", f"model.data.train_ds.file_names=[{rows}]"]
    for name, *more in (
        ("files_longer", "trainer.max_steps=10"),
        ("files_other_batch", "model.global_batch_size=2", "resume.allow=[model]"),
    ):
        trained = partial(trained_on_files, rows)
        case(name, *files_alone, "model.kd.alpha=0", *more, prepare=trained)
    case("two_last", prepare=earlier_beside_it)
    case("older", prepare=lambda copy: edit(last(copy), lambda common: common.pop("nemo_kd")))
    early = ["exp_manager.create_early_stopping_callback=true", "trainer.max_steps=40"]
    patience = "exp_manager.early_stopping_callback_params.patience=20"
    case("stopped_early", *early, prepare=stopped_early)
    case("stopped_earlier", *early, prepare=partial(stopped_early, recorded=False))
    case("more_patience", *early, patience, prepare=stopped_early)
    # NeMo's own names for a directory.
    shutil.copytree(source, work / "here/nemo_experiments/gpt_sft_kd")
    os.chdir(work / "here")
    results["unnamed"] = again(work / "here", overrides)
    named = ["exp_manager.exp_dir=elsewhere", "exp_manager.name=a", "+exp_manager.version=v2"]
    shutil.copytree(source, work / "here/elsewhere/a/v2")
    student = work / "here/elsewhere/a/v2/checkpoints"
    (student / "gpt_sft_kd.nemo").rename(student / "a.nemo")
    results["named"] = again(work / "here", [*overrides, *named])
    out.write_text(json.dumps({"cases": results, "lr": nemo_lr()}))


def nemo_lr() -> list[float]:
    """Of each step of a run of `LONGER_STEPS`."""
    from nemo.core.optim.lr_scheduler import CosineAnnealing

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LONGER_LR)
    schedule = CosineAnnealing(optimizer, max_steps=LONGER_STEPS, warmup_steps=2, min_lr=0.0)
    rates = []
    for _ in range(LONGER_STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
