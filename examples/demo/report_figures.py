"""The report's curves, as SVG text."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from report_data import MODELS, STUDENTS, Curve, Demo

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

COLOURS = {"teacher": "#6b7280", "sft": "#d97706", "kd": "#2563eb"}
SMOOTHING = 10  # steps; a training step sees a handful of samples
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "svg.fonttype": "path",
    "svg.hashsalt": "nemo-kd",
}


def running_mean(curve: Curve, width: int = SMOOTHING) -> Curve:
    """The mean over the last `width` steps."""
    values = [
        sum(part) / len(part)
        for i in range(len(curve.values))
        if (part := curve.values[max(0, i + 1 - width) : i + 1])
    ]
    return Curve(curve.steps, values)


def curves(demo: Demo) -> str:
    """Held-out cross-entropy and KL above, training cross-entropy and agreement below."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 6.2), layout="constrained")
        for name in STUDENTS:
            run = demo.runs[name]
            smooth = (running_mean(run.train(m)) for m in ("sft_loss", "top1_agreement"))
            panels = [run.held_out("sft_loss"), run.held_out("kd_loss"), *smooth]
            for axis, curve, dot in zip(axes.flat, panels, ("o", "o", "", ""), strict=True):
                axis.plot(
                    curve.steps,
                    curve.values,
                    color=COLOURS[name],
                    marker=dot,
                    markersize=3.5,
                    linewidth=1.8,
                    label=MODELS[name],
                )
        teacher = demo.evaluation["teacher"]["sft_loss"]
        axes[0, 0].axhline(
            teacher, color=COLOURS["teacher"], linestyle="--", linewidth=1.2, label="Teacher"
        )
        titles = (
            ("Held-out cross-entropy", "nats a token"),
            ("Held-out KL to the teacher", "nats a token"),
            (f"Training cross-entropy, mean of {SMOOTHING} steps", "nats a token"),
            (f"Training top-1 agreement, mean of {SMOOTHING} steps", "share of tokens"),
        )
        for axis, (title, label) in zip(axes.flat, titles, strict=True):
            axis.set(title=title, ylabel=label, xlabel="step")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0, 0].legend(frameon=False)
        return _svg(figure)


def layer_bars(demo: Demo) -> str:
    """Block influence of each layer; the student's layers in colour."""
    influence, kept = demo.layers["influence"], demo.layers["kept"]
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(9.6, 1.9), layout="constrained")
        colours = [COLOURS["kd"] if i in kept else "#d1d5db" for i in range(len(influence))]
        axis.bar(range(len(influence)), influence, color=colours, width=0.75)
        axis.set(yscale="log", xlabel="layer of the teacher", ylabel="block influence")
        axis.set_xlim(-0.6, len(influence) - 0.4)
        axis.grid(axis="x", visible=False)
        return _svg(figure)


def _svg(figure: Any) -> str:
    """The figure's SVG element, without the XML header."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
