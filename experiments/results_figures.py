"""Plots, as PNG: an experiment's curves and their difference from the baseline, and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from findings import Row, common, curves
from omegaconf import DictConfig
from steps_ratio import Curves, difference

matplotlib.use("agg")

from matplotlib import pyplot

COLOURS = ("#d97706", "#2563eb", "#059669", "#9333ea", "#dc2626", "#0891b2")
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
}


def draw(cfg: DictConfig, rows: Sequence[Row], baseline: str | None, path: Path) -> bool:
    """Draw the curves (left) and their difference from the baseline with its interval (right).

    Returns False, without a file, if no run has a curve.
    """
    drawn = [(row, found) for row in rows if (found := curves(row.found)) is not None]
    if not drawn:
        return False
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        base = next((row for row, _ in drawn if row.label == baseline), None)
        for i, (row, found) in enumerate(drawn):
            colour = COLOURS[i % len(COLOURS)]
            _curve(left, row.label, found, colour)
            if base is not None and row is not base:
                _difference(cfg, right, base, row, colour)
        if not right.has_data():
            right.set_visible(False)
        left.set(title="Held-out cross-entropy", xlabel="step", ylabel="nats per token")
        right.set(title=f"Difference from {baseline}", xlabel="step", ylabel="nats per token")
        right.axhline(0, color="#6b7280", linewidth=1)
        left.legend(frameon=False)
        _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _curve(axis: Any, label: str, found: Curves, colour: str) -> None:
    """Draw each seed faintly and their mean."""
    for values in found.values:
        one = replace(found, values=values[None]).mean()
        axis.plot(found.steps, one, color=colour, alpha=0.35, linewidth=0.8)
    seeds = f", {len(found.values)} seeds" if len(found.values) > 1 else ""
    axis.plot(found.steps, found.mean(), color=colour, marker="o", ms=3, label=label + seeds)


def draw_bytes(tables: Mapping[str, Sequence[Row]], path: Path) -> bool:
    """Draw the difference of stores from their table's baseline over their bytes per answer token.

    `tables`: label of a table in the legend → its rows. Returns False, without a file, if none has
    a difference.
    """
    found = {label: [row for row in rows if row.against_baseline] for label, rows in tables.items()}
    if not any(found.values()):
        return False
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
        for (label, rows), colour in zip(found.items(), COLOURS, strict=False):
            for row in rows:
                _store(axis, row, colour)
            axis.errorbar([], [], fmt="o", ms=4, color=colour, label=label)
        axis.axhline(0, color="#6b7280", linewidth=1)
        axis.margins(x=0.15)  # for the names
        axis.set(xscale="log", xlabel="bytes per answer token", ylabel="nats per token")
        axis.set(title="Cross-entropy on code compared with plain, K = 100")
        axis.set_xticks([20, 30, 50, 100])
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.legend(frameon=False)
        _save(figure, path)
    return True


def _store(axis: Any, row: Row, colour: str) -> None:
    """Draw one store with its interval and its name."""
    size, gap = row.bytes_per_token(), row.against_baseline
    if size is None or gap is None:
        return
    errors = [[gap.value - gap.low], [gap.high - gap.value]]
    axis.errorbar([size], [gap.value], errors, fmt="o", ms=4, capsize=2, color=colour)
    axis.annotate(row.label, (size, gap.value), (4, 4), textcoords="offset points", fontsize=7)


def _difference(cfg: DictConfig, axis: Any, base: Row, row: Row, colour: str) -> None:
    """Draw the difference at the validation steps and over the seeds that both have."""
    pair = common(base.seeds, row.seeds, curves)
    if pair is None or pair[0].steps[-1] != pair[1].steps[-1]:
        return  # at equal steps the learning rates of other lengths differ
    steps = np.intersect1d(*(found.steps for found in pair))
    boot = {**cfg.bootstrap, "draws": min(cfg.bootstrap.draws, 500)}
    gaps = [difference(*pair, **boot, step=int(step)) for step in steps]
    axis.fill_between(
        steps, [g.low for g in gaps], [g.high for g in gaps], color=colour, alpha=0.15, linewidth=0
    )
    axis.plot(steps, [g.value for g in gaps], color=colour, marker="o", ms=3, label=row.label)
