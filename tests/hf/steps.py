"""One step of plain gradient descent in transformers' Trainer; run as a script, of several ranks.

    python tests/hf/steps.py DIRECTORY STORE CONFIG RUNS

CONFIG is the JSON of a `KDConfig`, RUNS that of name → `TrainingArguments`. Writes the losses
of an evaluation and of the step, and the new weights, to DIRECTORY/NAME.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from nemo_kd.errors import NemoKDError
from nemo_kd.hf import StoreCollator, StoreDataset, StoreLossMixin
from nemo_kd.loss import KDConfig
from tests.hf.student import student


class StoreTrainer(StoreLossMixin, transformers.Trainer):
    pass


def arguments(directory: Path, **more: Any) -> dict[str, Any]:
    """One step at rate 1 without clipping: the weights change by their gradient."""
    return {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **more,
    }


def run(
    out: Path,
    store: str,
    config: KDConfig,
    pad_to: int | None = None,
    early: bool = False,
    **more: Any,
) -> dict[str, Any]:
    data = StoreDataset(store, config)
    trainer = StoreTrainer(
        model=student(),
        args=transformers.TrainingArguments(**arguments(out.parent, **more)),
        data_collator=StoreCollator(data, pad_to=pad_to),
        train_dataset=data,
        eval_dataset=data,
    )
    if early:
        trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    log = [line for line in trainer.state.log_history if "loss" in line]
    result = {"eval": after, "log": log, "weights": trainer.model.state_dict()}
    if trainer.args.process_index == 0:
        torch.save(result, out)
    return result


if __name__ == "__main__":
    directory, store, config, runs = sys.argv[1:]
    for name, more in json.loads(runs).items():
        out = Path(directory) / f"{name}.pt"
        try:
            run(out, store, KDConfig(**json.loads(config)), **more)
        except NemoKDError as error:
            torch.save(str(error), out)
