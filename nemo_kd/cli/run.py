"""The commands `nemo-kd dump | generate | train | evaluate | merge-lora` with Hydra overrides."""

from __future__ import annotations

import sys

import typer

from nemo_kd.cli.app import app
from nemo_kd.cli.jobs import JOBS, Job

PANEL = "Jobs (Hydra: KEY=VALUE ...; --help shows every key)"
AS_GIVEN = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def _add(name: str, job: Job) -> None:
    @app.command(name, help=job.summary, context_settings=AS_GIVEN, rich_help_panel=PANEL)
    def command(context: typer.Context) -> None:
        sys.argv = [f"nemo-kd {name}", *context.args]
        job.start()


for _name, _job in JOBS.items():
    _add(_name, _job)
