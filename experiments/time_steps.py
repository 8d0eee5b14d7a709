"""Measure what each choice costs per training step: `python experiments/time_steps.py`.

Short trainings of all choices alternate over several rounds, so that other work on the machine
affects all alike. Writes `timed/step_seconds.json` next to the result files:

    {"steps", "threads", "machine", "seconds": {label: [median seconds per step, one per round]}}
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from assets import Assets, training
from omegaconf import DictConfig, OmegaConf
from steps import ROOT, Step, Workshop, lock, write_json
from student import student_and_loss, train_stores
from study import TIMED, Run, read_choices

from nemo_kd.cli.scripts import script

sys.path.insert(0, str(ROOT / "examples" / "demo"))

import report_data


def timed_step(label: str, round_: int, run: Run, assets: Assets) -> Step:
    """A training of a few steps; its product is the directory, as nothing in it is resumed."""
    name = f"time-{round_}-" + re.sub(r"\W+", "-", label)
    product = assets.out / "timed" / name
    arguments = (
        "examples/train_gpt_sft_kd.py",
        "name=timed",
        f"exp_manager.explicit_log_dir={product}",
        "exp_manager.create_checkpoint_callback=false",
        f"trainer.max_steps={assets.cfg.choices.steps}",
        *student_and_loss(run, assets),
        *training(assets.cfg),
    )
    return Step(name, arguments, product)


def already_timed(path: Path, labels: set[str]) -> bool:
    """Whether the file has exactly these choices."""
    return path.is_file() and set(json.loads(path.read_text())["seconds"]) == labels


def main(cfg: DictConfig) -> None:
    os.chdir(ROOT)
    OmegaConf.resolve(cfg)
    out, results = Path(cfg.out).resolve(), Path(cfg.results).resolve()
    assets, workshop = Assets(cfg, out), Workshop(out, cfg.threads)
    runs = {label: runs[0] for label, runs in read_choices(cfg).runs.items()}
    if already_timed(results / TIMED, set(runs)):
        print(f"every choice is in {results / TIMED}; without that file it is measured again")
        return
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    held = lock(out, shared=False)
    for run in runs.values():
        for step in assets.student_steps(run.domain, run.layers) + train_stores(run, assets)[0]:
            workshop.run(step)
    for round_ in range(cfg.choices.rounds):
        for label, run in runs.items():
            step = timed_step(label, round_, run, assets)
            workshop.run(step)
            log = report_data.read_run(step.product / "metrics.jsonl")
            seconds[label].append(round(log.seconds_per_step, 4))
    held.close()
    content = {
        "steps": cfg.choices.steps,
        "threads": cfg.threads,
        "machine": report_data.machine(),
        "seconds": seconds,
    }
    write_json(results / TIMED, content)


if __name__ == "__main__":
    script(main, ROOT / "experiments/conf", "config", resume="run the same command to resume")
