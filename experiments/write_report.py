"""Write docs/results.md and its pictures from the result files.

`python experiments/write_report.py`, with the overrides of `run.py`; other settings than those of
the results are refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from config_check import check_config
from findings import finder, rows
from omegaconf import DictConfig, OmegaConf
from queue_plan import check_results, read_results
from results_figures import draw, draw_bytes
from results_page import page
from results_parts import BYTES, Study
from steps import ROOT
from study import REPEATED, TIMED, read_choices, read_experiments

from nemo_kd.cli.scripts import script
from nemo_kd.errors import NemoKDError

PICTURES = "images/results"
STORES = {
    "alpha 0.9": "bytes",
    "alpha 0.5": "small_stores",
}
"""Label in the picture of bytes → experiment."""


def read_study(cfg: DictConfig) -> Study:
    """The configured experiments with their results in `cfg.results`."""
    directory = Path(cfg.results)
    results, experiments = read_results(directory), read_experiments(cfg)
    find = finder(cfg, results)
    data = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in directory.glob("data/*.json")
    }
    timed = directory / TIMED
    return Study(
        cfg=cfg,
        experiments=experiments,
        rows={experiment.name: rows(cfg, experiment, find) for experiment in experiments},
        results=results,
        data=dict(sorted(data.items())),
        choices=rows(cfg, read_choices(cfg), find),
        timed=json.loads(timed.read_text(encoding="utf-8")) if timed.is_file() else None,
        repeated=read_results(directory / REPEATED),
    )


def write(study: Study, docs: Path) -> None:
    """Write the page and its pictures into `docs`."""
    figures = {}
    for experiment in study.experiments:
        picture = f"{PICTURES}/{experiment.name}.png"
        found = study.rows[experiment.name]
        if draw(study.cfg, found, experiment.baseline, docs / picture):
            figures[experiment.name] = picture
    bytes_picture = f"{PICTURES}/{BYTES}.png"
    tables = {label: study.rows[name] for label, name in STORES.items() if name in study.rows}
    if draw_bytes(tables, docs / bytes_picture):
        figures[BYTES] = bytes_picture
    text = page(study, figures)
    (docs / "results.md").write_text(text, encoding="utf-8")


def main(cfg: DictConfig) -> None:
    os.chdir(ROOT)
    OmegaConf.resolve(cfg)
    check_config(cfg)
    for key in ("only", "max_hours"):
        if cfg[key] is not None:
            raise NemoKDError(f"{key}={cfg[key]}: the page has all results; leave {key} out")
    if cfg.list:
        raise NemoKDError("list=true: give it to run.py, which lists the remaining runs")
    results = read_results(Path(cfg.results))
    if not results:
        raise NemoKDError(f"results={cfg.results} has no result files: run.py writes them")
    check_results(cfg, results)
    write(read_study(cfg), Path("docs"))
    print(f"docs/results.md, docs/{PICTURES}")


if __name__ == "__main__":
    script(main, ROOT / "experiments/conf", "config", resume="run the same command to resume")
