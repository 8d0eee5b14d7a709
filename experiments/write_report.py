"""Write docs/results.md, its pictures and a self-contained HTML from the result files.

`python experiments/write_report.py`, with the overrides of `run.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from findings import rows
from omegaconf import DictConfig, OmegaConf
from queue_plan import read_results
from results_figures import draw
from results_html import html
from results_page import Study, page
from steps import ROOT
from study import TIMED, read_choices, read_experiments

from nemo_kd.cli.scripts import script

PICTURES = "images/results"


def read_study(cfg: DictConfig) -> Study:
    """The configuration's experiments, with what `cfg.results` has of them."""
    directory = Path(cfg.results)
    results, experiments = read_results(directory), read_experiments(cfg)
    data = {path.stem: json.loads(path.read_text()) for path in directory.glob("data/*.json")}
    timed = directory / TIMED
    return Study(
        cfg=cfg,
        experiments=experiments,
        rows={experiment.name: rows(cfg, experiment, results) for experiment in experiments},
        results=results,
        data=dict(sorted(data.items())),
        choices=rows(cfg, read_choices(cfg), results),
        timed=json.loads(timed.read_text()) if timed.is_file() else None,
    )


def write(study: Study, docs: Path, html_path: Path) -> None:
    """The page, its pictures, and the same in one file."""
    figures = {}
    for experiment in study.experiments:
        picture = f"{PICTURES}/{experiment.name}.png"
        found = study.rows[experiment.name]
        if draw(study.cfg, found, experiment.baseline, docs / picture):
            figures[experiment.name] = picture
    text = page(study, figures)
    (docs / "results.md").write_text(text, encoding="utf-8")
    html_path.parent.mkdir(parents=True, exist_ok=True)
    html_path.write_text(html(text, docs), encoding="utf-8")


def main(cfg: DictConfig) -> None:
    os.chdir(ROOT)
    OmegaConf.resolve(cfg)
    html_path = Path(cfg.results) / "report.html"
    write(read_study(cfg), Path("docs"), html_path)
    print(f"docs/results.md, docs/{PICTURES}, {html_path}")


if __name__ == "__main__":
    script(main, ROOT / "experiments/conf", "config", resume="run the same command to resume")
