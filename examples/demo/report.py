"""Write the demo's report, a self-contained `report.html`, and print its table.

All figures come from the files that the demo's steps wrote: see `report_data.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from report_data import MODELS, Demo, MissingStepError, read_demo
from report_page import page
from rich.console import Console
from rich.table import Table


def terminal_table(demo: Demo) -> Table:
    """Return the page's table for the terminal."""
    table = Table(title="held-out data, nats per token")
    table.add_column("")
    for name in ("cross-entropy", "KL to the teacher", "top-1 agreement"):
        table.add_column(name, justify="right")
    for name, title in MODELS.items():
        figures = demo.evaluation[name]
        agreement = f"{100 * figures['top1_agreement']:.1f} %"
        table.add_row(title, f"{figures['sft_loss']:.3f}", f"{figures['kd_loss']:.3f}", agreement)
    return table


def main(
    demo: Annotated[Path, typer.Option(help="directory of the demo's results")],
) -> None:
    """Write DEMO/report.html and print the table."""
    try:
        results = read_demo(demo)
    except MissingStepError as error:
        sys.exit(f"error: {error}")
    path = demo / "report.html"
    path.write_text(page(results), encoding="utf-8")
    console = Console()
    console.print(terminal_table(results))
    exported = results.exported
    console.print(
        f"exported student, float32: {exported['sft_loss']:.5f} in transformers, "
        f"{exported['evaluated']:.5f} in NeMo",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f"report: {path}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
