"""Run the experiments: `python experiments/run.py --help`."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from assets import Assets
from config_check import check_config
from omegaconf import DictConfig, OmegaConf
from queue_plan import (
    Job,
    Results,
    check_results,
    estimate,
    first_free,
    read_results,
    remaining,
)
from steps import ROOT, StepFailedError, Workshop, lock, locks_of, remove, write_json
from student import combine, directory, result, steps, validation_interval
from study import DOMAINS, Experiment, read_experiments, select, settings

from nemo_kd.cli.scripts import script

POLL_SECONDS = 20


def do(job: Job, assets: Assets, workshop: Workshop, results: Path) -> None:
    """Run the steps that are not done, then write the result file."""
    for step in steps(job.run, assets, job.also):
        workshop.run(step)
    file = results / f"{job.run.name}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    content = combine(before, result(job.run, assets, workshop, job.also))
    for path in (assets.out / "results" / file.name, file):
        write_json(path, content)
    for path in (directory(job.run, assets) / "checkpoints").glob("*"):
        if path.suffix != ".nemo":
            remove(path)  # only needed to resume; the trained model is the .nemo


def say(jobs: list[Job], cfg: DictConfig, found: Results) -> None:
    """Print the remaining jobs, one per line."""
    hours = 0.0
    for job in jobs:
        hours += estimate(cfg, job, found) / 3600
        more = "".join(f", {each}" for each in job.also)
        waits = "" if job.decided else ", once its learning rate is chosen"
        print(f"{hours:7.2f} h  {job.run.name}{more}{waits}")
    print(f"{len(jobs)} runs remain, about {hours:.1f} h without the parts that runs share")


def collect(out: Path, results: Path) -> None:
    """Copy the facts of data and stores that the report needs next to the results."""
    for domain in DOMAINS:
        source = out / "data" / domain / "data.json"
        if source.is_file():
            target = results / "data" / f"{domain}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


@dataclass(frozen=True)
class Queue:
    """Runs jobs until none remains, side by side with other queues of the same results."""

    cfg: DictConfig
    experiments: list[Experiment]
    out: Path
    results: Path

    def jobs(self) -> tuple[list[Job], Results]:
        """The remaining jobs, and the results so far.

        Errors: NemoKDError for results of another configuration, or unsuitable numbers of steps.
        """
        found = read_results(self.results)
        check_results(self.cfg, found)
        jobs = remaining(self.cfg, self.experiments, found)
        own = {domain: settings(self.cfg, domain) for domain in DOMAINS}
        for run in (job.run for job in jobs if job.run.length > 0):
            validation_interval(own[run.domain], run)
        return jobs, found

    def run(self) -> list[str]:
        """Run the first remaining job until none is left or the time is up; the failed ones."""
        start, limit = time.monotonic(), self.cfg.max_hours
        assets, workshop = Assets(self.cfg, self.out), Workshop(self.out, self.cfg.threads)
        failed: list[str] = []
        while True:
            jobs, found = self.jobs()
            ready = [job for job in jobs if job.decided and job.run.name not in failed]
            if not ready:
                return failed
            if limit is not None and time.monotonic() - start > limit * 3600:
                print(f"{limit} h are over")
                return failed
            claimed = first_free(ready, self.out / "locks", locks_of(self.results))
            if claimed is None:
                time.sleep(POLL_SECONDS)  # other queues have them all; their results may free some
                continue
            job, claim = claimed
            with claim:
                if job.is_done(read_results(self.results)):
                    continue  # by another queue, between reading and claiming
                hours = sum(estimate(self.cfg, each, found) for each in jobs) / 3600
                print(f"\n#### {job.run.name}; {len(jobs)} remain, {hours:.1f} h", flush=True)
                try:
                    do(job, assets, workshop, self.results)
                except StepFailedError as error:
                    # Others may still succeed; failed runs are named again at the end.
                    print(f"error: {error}", file=sys.stderr, flush=True)
                    failed.append(job.run.name)
                collect(self.out, self.results)


def run(cfg: DictConfig) -> None:
    """List or run what remains."""
    check_config(cfg)
    out, results = Path(cfg.out).resolve(), Path(cfg.results).resolve()
    queue = Queue(cfg, select(read_experiments(cfg), cfg.only), out, results)
    jobs, found = queue.jobs()
    if cfg.list:
        return say(jobs, cfg, found)
    if not jobs:
        return print(
            f"every run is in {cfg.results}; to run all again, give a new results= and a new out=, "
            "such as results=outputs/again out=outputs/again/work"
        )
    with lock(out, shared=True):
        failed = queue.run()
    if failed:
        sys.exit(f"error: {len(failed)} runs failed: {', '.join(sorted(failed))}; see {out}/logs")


def main(cfg: DictConfig) -> None:
    os.chdir(ROOT)
    OmegaConf.resolve(cfg)
    run(cfg)


if __name__ == "__main__":
    script(main, ROOT / "experiments/conf", "config", resume="run the same command to resume")
