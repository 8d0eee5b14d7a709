"""Measure what each choice costs per training step: `python experiments/time_steps.py`.

Short trainings of all choices alternate over several rounds, each of which starts with another
choice, so that other work on the machine affects all alike. Writes `timed/step_seconds.json` next
to the result files:

    {"steps", "threads", "machine", "seconds": {label: [median seconds per step, one per round]}}

It is measured again, from the start, once this file is removed or the configuration asks for other
choices, rounds, steps or threads.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from assets import Assets, training
from config_check import check_config
from omegaconf import DictConfig, OmegaConf
from steps import ROOT, Step, Workshop, lock, write_json
from student import student_and_loss, train_stores
from study import TIMED, Run, read_choices

from nemo_kd.cli.scripts import script

sys.path.insert(0, str(ROOT / "examples" / "demo"))

import report_data


def timed_step(label: str, round_: int, run: Run, assets: Assets) -> Step:
    """A training of a few steps; its product is the directory, as nothing in it is resumed."""
    steps, threads = assets.cfg.choices.steps, assets.cfg.threads
    name = f"time-{steps}-steps-{threads}-threads-{round_}-" + re.sub(r"\W+", "-", label)
    product = assets.out / "timed" / name
    arguments = (
        "examples/train_gpt_sft_kd.py",
        "name=timed",
        f"exp_manager.explicit_log_dir={product}",
        "exp_manager.create_checkpoint_callback=false",
        f"trainer.max_steps={steps}",
        *student_and_loss(run, assets),
        *training(assets.cfg),
    )
    return Step(name, arguments, product)


def order(labels: list[str], round_: int, rounds: int) -> list[str]:
    """The choices in the order of a round; over the rounds each is early, midway and late."""
    first = round_ * len(labels) // rounds
    return labels[first:] + labels[:first]


def other_than_asked(found: dict[str, Any], labels: list[str], cfg: DictConfig) -> list[str]:
    """In what earlier timings differ from the configuration, `2 rounds instead of 3`."""
    rounds = sorted({len(times) for times in found["seconds"].values()})
    pairs = {
        "rounds": (", ".join(map(str, rounds)), str(cfg.choices.rounds)),
        "steps": (found["steps"], cfg.choices.steps),
        "threads": (found["threads"], cfg.threads),
    }
    changed = [f"{old} {what} instead of {new}" for what, (old, new) in pairs.items() if old != new]
    return changed + (["other choices"] if set(found["seconds"]) != set(labels) else [])


def measure(runs: dict[str, Run], assets: Assets, workshop: Workshop) -> dict[str, list[float]]:
    """Seconds per step of each label, one per round."""
    for run in runs.values():
        for step in assets.student_steps(run.domain, run.layers) + train_stores(run, assets)[0]:
            workshop.run(step)
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    rounds = assets.cfg.choices.rounds
    for round_ in range(rounds):
        for label in order(list(runs), round_, rounds):
            step = timed_step(label, round_, runs[label], assets)
            workshop.run(step)
            log = report_data.read_run(step.product / "metrics.jsonl")
            seconds[label].append(round(log.seconds_per_step, 4))
    return seconds


def main(cfg: DictConfig) -> None:
    os.chdir(ROOT)
    OmegaConf.resolve(cfg)
    check_config(cfg)
    out, file = Path(cfg.out).resolve(), Path(cfg.results).resolve() / TIMED
    assets, workshop = Assets(cfg, out), Workshop(out, cfg.threads)
    runs = {label: runs[0] for label, runs in read_choices(cfg).runs.items()}
    if file.is_file():
        changed = other_than_asked(json.loads(file.read_text(encoding="utf-8")), list(runs), cfg)
        if not changed:
            return print(f"every choice is in {file}; without that file it is measured again")
        print(f"{file} has {', '.join(changed)}: measured again")
    with lock(out, shared=False):
        seconds = measure(runs, assets, workshop)
        content = {
            "steps": cfg.choices.steps,
            "threads": cfg.threads,
            "machine": report_data.machine(),
            "seconds": seconds,
        }
        write_json(file, content)
        for label, run in runs.items():
            for round_ in range(cfg.choices.rounds):
                workshop.forget(timed_step(label, round_, run, assets))


if __name__ == "__main__":
    script(main, ROOT / "experiments/conf", "config", resume="run the same command to resume")
