"""The report's charts as SVG text, narrow enough for a phone."""

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
SIZE = (4.2, 2.9)  # inches
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
    """Return the mean over the last `width` steps."""
    values = [
        sum(part) / len(part)
        for i in range(len(curve.values))
        if (part := curve.values[max(0, i + 1 - width) : i + 1])
    ]
    return Curve(curve.steps, values)


def curves(demo: Demo) -> list[str]:
    """Plot held-out cross-entropy and KL, training cross-entropy and agreement, one chart each."""
    titles = (
        ("Held-out cross-entropy", "nats per token"),
        ("Held-out KL to the teacher", "nats per token"),
        (f"Training cross-entropy, mean of {SMOOTHING} steps", "nats per token"),
        (f"Training top-1 agreement, mean of {SMOOTHING} steps", "fraction of tokens"),
    )
    runs = [demo.runs[name] for name in STUDENTS]
    panels = (
        [run.held_out("sft_loss") for run in runs],
        [run.held_out("kd_loss") for run in runs],
        [running_mean(run.train("sft_loss")) for run in runs],
        [running_mean(run.train("top1_agreement")) for run in runs],
    )
    teacher = demo.evaluation["teacher"]["sft_loss"]
    lines = (teacher, None, None, None)
    return [
        chart(students, title, unit, line)
        for students, (title, unit), line in zip(panels, titles, lines, strict=True)
    ]


def chart(students: list[Curve], title: str, unit: str, teacher: float | None) -> str:
    """Plot one curve per student, and the teacher's value as a dashed line."""
    with pyplot.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
        for name, curve in zip(STUDENTS, students, strict=True):
            dotted = title.startswith("Held-out")
            dots: dict[str, Any] = {"marker": "o", "markersize": 3.5} if dotted else {}
            axis.plot(
                curve.steps,
                curve.values,
                color=COLOURS[name],
                linewidth=1.8,
                label=MODELS[name],
                **dots,
            )
        if teacher is not None:
            colour = COLOURS["teacher"]
            axis.axhline(teacher, color=colour, linestyle="--", linewidth=1.2, label="Teacher")
        axis.set(title=title, ylabel=unit, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False)
        return _svg(figure)


def layer_bars(demo: Demo) -> str:
    """Plot the block influence of each layer, with the student's layers in colour."""
    influence, kept = demo.layers["influence"], demo.layers["kept"]
    with pyplot.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axis = pyplot.subplots(figsize=(SIZE[0], 1.9), layout="constrained")
        colours = [COLOURS["kd"] if i in kept else "#d1d5db" for i in range(len(influence))]
        axis.bar(range(len(influence)), influence, color=colours, width=0.75)
        axis.set(yscale="log", xlabel="layer of the teacher", ylabel="block influence")
        axis.set_xlim(-0.6, len(influence) - 0.4)
        axis.grid(axis="x", visible=False)
        return _svg(figure)


def _svg(figure: Any) -> str:
    """Return the figure's SVG element, without the XML header."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
