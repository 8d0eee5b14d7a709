"""`nemo-kd doctor`: examine the environment."""

from __future__ import annotations

import typer

from nemo_kd.cli.app import Json, app, print_json


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, GPUs and which parts work here; exit status 0 on a supported stack."""
    from nemo_kd.doctor import announce, as_text, examine

    announce()
    report = examine()
    if as_json:
        print_json(report.to_json())
    else:
        typer.echo(as_text(report))
    if not report.supported:
        raise typer.Exit(1)
