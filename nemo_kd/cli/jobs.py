"""The jobs configured through Hydra: `nemo-kd dump | generate | train | evaluate | merge-lora`.

The scripts in `examples/` start the same jobs with the configurations of their checkout.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import nemo_kd
from nemo_kd.errors import NemoKDError

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Job:
    """A function that takes a configuration, and the file in `conf/` with its defaults."""

    summary: str
    config_name: str
    module: str
    function: str
    resume: str
    """Message that says what rerunning the command does after an interruption."""

    def start(self, conf: Path | None = None) -> None:
        """Run with the arguments in `sys.argv`; `conf` defaults to the package's configurations."""
        from nemo_kd.cli.scripts import script

        def job(cfg: DictConfig) -> None:
            getattr(import_module(self.module), self.function)(cfg)

        script(job, packaged_conf() if conf is None else conf, self.config_name, self.resume)


SHARDS = "the same command resumes after the last complete shard"
NOTHING = "nothing was written; the same command starts over"
JOBS = {
    "dump": Job(
        "Store the top-K logits of a teacher's pass over SFT data.",
        "dump_teacher_topk",
        "nemo_kd.cli.teacher",
        "run",
        SHARDS,
    ),
    "generate": Job(
        "Let a teacher generate answers, and store its top-K logits in the same pass.",
        "generate_with_teacher",
        "nemo_kd.cli.teacher",
        "run_generation",
        SHARDS,
    ),
    "train": Job(
        "Train a student on a store: SFT with knowledge distillation.",
        "train_gpt_sft_kd",
        "nemo_kd.nemo.train",
        "run",
        "the same command resumes from the last checkpoint",
    ),
    "evaluate": Job(
        "Measure a model on held-out stores.",
        "evaluate_gpt_sft_kd",
        "nemo_kd.nemo.train",
        "evaluate",
        NOTHING,
    ),
    "merge-lora": Job(
        "Merge LoRA adapters into their model.",
        "merge_lora",
        "nemo_kd.nemo.train",
        "merge",
        NOTHING,
    ),
}


def packaged_conf() -> Path:
    """Return the configuration directory: `nemo_kd/conf` if installed, `conf/` in a checkout."""
    package = Path(nemo_kd.__file__).parent
    for conf in (package / "conf", package.parent / "conf"):
        if conf.is_dir():
            return conf
    raise NemoKDError(f"{package} has no conf/ with the jobs' configurations: reinstall nemo-kd")
