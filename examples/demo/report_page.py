"""The report as one HTML page, without scripts or external resources."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

import report_figures
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from report_data import MODELS, STUDENTS, Demo, machine, versions

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --blue: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f4f6; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; }
p { margin: .4rem 0 .8rem; max-width: 48rem; }
.lead { font-size: 1.08rem; }
.soft { color: var(--soft); }
.card { background: white; border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.3rem; margin: 1rem 0; overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 1.2rem; }
.card svg { width: 100%; max-width: 36rem; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .5rem .75rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--soft); font-size: .86rem; vertical-align: bottom; }
tr:last-child td { border-bottom: 0; }
td.best { font-weight: 700; color: var(--blue); }
.small td, .small th { font-size: .88rem; padding: .35rem .6rem; }
pre { margin: 0; font: .79rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr));
  gap: .8rem; margin-top: .9rem; }
.answer { border: 1px solid var(--line); border-top: 3px solid var(--colour); border-radius: 6px;
  padding: .6rem .8rem; background: #fcfcfd; }
.answer h4 { margin: 0 0 .35rem; font-size: .8rem; color: var(--colour); }
.origin { font-size: .82rem; color: var(--soft); margin: 0 0 .5rem; }
code { font: .85em ui-monospace, Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
details { margin: .2rem 0; } summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0;
  font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1.2rem .7rem 2rem; }
  .card { padding: .7rem; }
  th, td { padding: .35rem .25rem; font-size: .82rem; }
  dl { grid-template-columns: 1fr; } dd { margin: 0 0 .4rem; }
}
"""


def page(demo: Demo) -> str:
    """Return the HTML document."""
    sections = [
        heading(demo),
        f"<div class='card'>{results_table(demo)}</div>{metric_notes(demo)}",
        "<h2>Learning curves</h2>"
        f"<div class='card charts'>{''.join(report_figures.curves(demo))}</div>",
        layers(demo),
        "<h2>Held-out prompts, completed greedily</h2>",
        *(sample(row) for row in demo.completions["samples"]),
        in_transformers(demo),
        what_was_run(demo),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>nemo-kd demo</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def heading(demo: Demo) -> str:
    """Summarise the outcome in two sentences."""
    sft, kd = (demo.evaluation[name]["sft_loss"] for name in STUDENTS)
    teacher, before = (demo.evaluation[name]["sft_loss"] for name in ("teacher", "student"))
    word = "below" if kd < sft else "above"
    return (
        "<h1>Distillation from stored top-K logits</h1>"
        f"<p class='lead'>After {last_step(demo)} steps on the same data in the same order, "
        f"KD + SFT (alpha {alpha(demo)}) has a held-out cross-entropy of {kd:.3f} nats per token, "
        f"{abs(sft - kd):.3f} {word} SFT only ({sft:.3f}). The student started at {before:.2f}; "
        f"the teacher has {teacher:.3f}.</p>"
    )


def alpha(demo: Demo) -> str:
    """Return the weight of the distillation from the run's command."""
    (command,) = (step["command"] for title, step in demo.steps.items() if "KD" in title)
    match = re.search(r"model\.kd\.alpha=(\S+)", command)
    return match[1] if match else "by default"


def last_step(demo: Demo) -> int:
    """Return the number of training steps of both students."""
    return max(demo.runs["kd"].training)


def results_table(demo: Demo) -> str:
    """Return a table with one row per model, the better student in bold."""
    names = ["", "layers", "cross-entropy", "KL to the teacher", "top-1 agreement"]
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    depth = {"teacher": len(demo.layers["influence"])}
    for name, title in MODELS.items():
        figures = demo.evaluation[name]
        cells = [f"<td>{title}</td><td>{depth.get(name, len(demo.layers['kept']))}</td>"]
        for metric, text in (
            ("sft_loss", f"{figures['sft_loss']:.3f}"),
            ("kd_loss", f"{figures['kd_loss']:.3f}"),
            ("top1_agreement", f"{100 * figures['top1_agreement']:.1f} %"),
        ):
            cells.append(f"<td{best_class(demo, name, metric)}>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def best_class(demo: Demo, name: str, metric: str) -> str:
    """Return the HTML attribute for the better student's cell."""
    if name not in STUDENTS:
        return ""
    values = [demo.evaluation[student][metric] for student in STUDENTS]
    best = max(values) if metric == "top1_agreement" else min(values)
    return " class='best'" if demo.evaluation[name][metric] == best else ""


def metric_notes(demo: Demo) -> str:
    """Explain the columns of the table."""
    heldout = demo.data["heldout"]
    return (
        f"<p class='soft'>Over the answer tokens of {heldout['samples']} held-out functions, from "
        f"{heldout['modules']} modules that are not in the training data, in nats per token. KL is "
        "over the teacher's stored top-K ids and one bucket for all others, a lower bound of "
        "the full KL. Agreement: how often model and teacher have the same top-1.</p>"
    )


def layers(demo: Demo) -> str:
    """Describe the student's layers and how they were chosen."""
    kept, total = demo.layers["kept"], len(demo.layers["influence"])
    return (
        "<h2>The student</h2>"
        f"<p>The teacher pruned to {len(kept)} of its {total} layers, those that change "
        "the residual stream most (1 − cosine of their input and output; in colour).</p>"
        f"<div class='card'>{report_figures.layer_bars(demo)}</div>"
    )


def sample(row: dict[str, Any]) -> str:
    """Show a prompt, its reference, and each model's completion side by side."""
    columns = [("Reference", row["reference"], "#059669")]
    for name, title in MODELS.items():
        if name in row["completions"]:
            colour = report_figures.COLOURS.get(name, "#6b7280")
            columns.append((title, row["completions"][name], colour))
    cells = "".join(
        f"<div class='answer' style='--colour:{colour}'><h4>{escape(title)}</h4>"
        f"<pre>{python(text)}</pre></div>"
        for title, text, colour in columns
    )
    origin = f"{row['module']}, {row['function']}"
    return (
        f"<div class='card'><p class='origin'>{escape(origin)}</p>"
        f"<pre>{python(row['prompt'])}</pre><div class='grid'>{cells}</div></div>"
    )


def in_transformers(demo: Demo) -> str:
    """Show how to load the exported student, and that it is the one that NeMo measured."""
    exported = demo.exported
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({exported['model']!r})"
    )
    return (
        "<h2>The student in transformers</h2>"
        f"<div class='card'><pre>{python(code)}</pre></div>"
        f"<p>In float32 its held-out cross-entropy is {exported['sft_loss']:.5f} nats per token "
        f"in transformers and {exported['evaluated']:.5f} in NeMo; {exported['same_completions']} "
        f"of the {exported['completions']} completions above are the same text.</p>"
    )


def python(text: str) -> str:
    """Highlight source code; an empty first line belongs to the template and is removed."""
    formatter = HtmlFormatter(nowrap=True, noclasses=True, style="xcode")
    highlighted: str = highlight(
        re.sub(r"^\s*\n", "", text).rstrip(), PythonLexer(stripnl=False), formatter
    )
    return highlighted


def what_was_run(demo: Demo) -> str:
    """List commands with their times, data, versions and machine."""
    rows = "".join(
        f"<tr><td><details><summary>{escape(title)}</summary>"
        f"<code>{escape(step['command'])}</code></details></td><td>{step['seconds']:.0f}</td></tr>"
        for title, step in demo.steps.items()
    )
    total = sum(step["seconds"] for step in demo.steps.values())
    table = (
        "<table class='small'><tr><th>step</th><th>seconds</th></tr>"
        f"{rows}<tr><td>total</td><td>{total:.0f}</td></tr></table>"
    )
    return (
        f"<h2>What was run</h2><div class='card'>{definitions(facts(demo))}</div>"
        f"<div class='card'>{table}</div>"
    )


def facts(demo: Demo) -> Iterable[tuple[str, str]]:
    """Yield name and value of each fact about data, store, machine and versions."""
    for side, title in (("train", "training data"), ("heldout", "held-out data")):
        size = demo.data[side]
        counts = [f"{size[unit]:,} {unit}" for unit in ("samples", "tokens", "modules")]
        yield title, ", ".join(counts)
    totals, spec = demo.store.manifest.totals, demo.store.spec
    yield (
        "teacher's logits",
        f"top {spec.top_k} of {spec.vocab_size:,} at {totals['answer_tokens']:,} answer tokens, "
        f"{totals['bytes'] / 1e6:.1f} MB",
    )
    sources = (f"{s['package']} {s['version']} ({s['licence']})" for s in demo.data["sources"])
    yield "sources", ", ".join(sources)
    seconds = (f"{MODELS[n]} {demo.runs[n].seconds_per_step:.2f} s" for n in STUDENTS)
    yield "time per step", ", ".join(seconds)
    yield "machine", machine()
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions().items())


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return an HTML list of names and values."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f"<dl>{items}</dl>"
