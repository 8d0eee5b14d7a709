"""Run the experiments: `python experiments/run.py --help`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from assets import Assets
from omegaconf import DictConfig, OmegaConf
from queue_plan import Job, estimate, first_free, read_results, remaining
from steps import ROOT, StepFailedError, Workshop, lock, remove, write_json
from student import directory, result, steps
from study import Experiment, read_experiments

from nemo_kd.cli.scripts import script

POLL_SECONDS = 20
DOMAINS = ("code", "prose", "math", "worded")


def select(experiments: list[Experiment], only: Any) -> list[Experiment]:
    """The named experiments in queue order. Errors: ValueError for an unknown name."""
    if only is None:
        return experiments
    names = [only] if isinstance(only, str) else list(only)
    known = [experiment.name for experiment in experiments]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"only={unknown[0]}: expected some of {', '.join(known)}")
    return [experiment for experiment in experiments if experiment.name in names]


def do(job: Job, assets: Assets, workshop: Workshop, results: Path) -> None:
    """Run the steps that are not done, then write the result file."""
    for step in steps(job.run, assets, job.also):
        workshop.run(step)
    file = results / f"{job.run.name}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    content = result(job.run, assets, workshop, job.also)
    content = {**before, **content, "seconds": before.get("seconds", {}) | content["seconds"]}
    for path in (assets.out / "results" / file.name, file):
        write_json(path, content)
    for path in (directory(job.run, assets) / "checkpoints").glob("*"):
        if path.suffix != ".nemo":
            remove(path)  # the state for going on; what is learned is in the .nemo


def say(jobs: list[Job], cfg: DictConfig, found: dict[str, Any]) -> None:
    """Print the remaining jobs, one per line."""
    hours = 0.0
    for job in jobs:
        hours += estimate(cfg, job, found) / 3600
        more = "".join(f", {each}" for each in job.also)
        waits = "" if job.decided else ", once its learning rate is chosen"
        print(f"{hours:7.2f} h  {job.run.name}{more}{waits}")
    print(f"{len(jobs)} runs remain, about {hours:.1f} h with what is made once for all left out")


def collect(out: Path, results: Path) -> None:
    """Copy the facts of data and stores that the report needs next to the results."""
    for domain in DOMAINS:
        source = out / "data" / domain / "data.json"
        if source.is_file():
            target = results / "data" / f"{domain}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def run(cfg: DictConfig) -> None:
    """Run the first remaining job until none remains or the time is up."""
    start = time.monotonic()
    out, results = Path(cfg.out).resolve(), Path(cfg.results).resolve()
    assets, workshop = Assets(cfg, out), Workshop(out, cfg.threads)
    experiments = select(read_experiments(cfg), cfg.only)
    failed: set[str] = set()
    found = read_results(results)
    jobs = remaining(cfg, experiments, found)
    if cfg.list:
        return say(jobs, cfg, found)
    if not jobs:
        return print(f"every run is in {cfg.results}; results=outputs/again runs all of it again")
    held = lock(out, shared=True)
    while ready := [job for job in jobs if job.decided and job.run.name not in failed]:
        if cfg.max_hours is not None and time.monotonic() - start > cfg.max_hours * 3600:
            print(f"{cfg.max_hours} h are over")
            break
        hours = sum(estimate(cfg, job, found) for job in jobs) / 3600
        if (claimed := first_free(ready, out)) is None:
            time.sleep(POLL_SECONDS)  # other queues have them all; what they find may free others
        else:
            job, file = claimed
            print(f"\n#### {job.run.name}; {len(jobs)} remain, {hours:.1f} h", flush=True)
            try:
                do(job, assets, workshop, results)
            except StepFailedError as error:
                # The others may well work: this one is named again at the end.
                print(f"error: {error}", file=sys.stderr, flush=True)
                failed.add(job.run.name)
            file.close()
            collect(out, results)
        found = read_results(results)
        jobs = remaining(cfg, experiments, found)
    held.close()
    if failed:
        sys.exit(f"error: {len(failed)} runs failed: {', '.join(sorted(failed))}; see {out}/logs")


def main(cfg: DictConfig) -> None:
    os.chdir(ROOT)
    OmegaConf.resolve(cfg)
    run(cfg)


if __name__ == "__main__":
    script(main, ROOT / "experiments/conf", "config", resume="run the same command to resume")
