"""Copy the first rows of a JSONL file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from nemo_kd.files import publish


def main(
    source: Annotated[Path, typer.Argument(help="JSONL")],
    rows: Annotated[int, typer.Option(help="how many to copy")],
    output: Annotated[Path, typer.Option(help="JSONL to write")],
) -> None:
    """Copy the first rows of a JSONL file; it is an error if there are fewer."""
    with source.open(encoding="utf-8") as lines:
        found = list(islice(lines, rows))
    if len(found) < rows:
        raise typer.BadParameter(f"{source} has {len(found)} rows, not {rows}: lower --rows")
    publish(output, "".join(found))


if __name__ == "__main__":
    typer.run(main)
