"""`nemo-kd`: look into stores, check them, make others of them, plan a dump; and a doctor.

Commands import what they need when they run: `--help` and `inspect` answer at once. Results go to
standard output, progress and errors to standard error. Exit status 1: an error, or problems found.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """The entry point: what a user can do something about is one line, not a traceback."""
    try:
        from rich.console import Console

        from nemo_kd.cli import doctor, look, make, plan  # noqa: F401 (each adds its commands)
        from nemo_kd.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(
            f'error: {error.name} is not installed; pip install typer rich, or "nemo-kd[nemo]"'
        )
    from nemo_kd.store.errors import StoreError

    try:
        app(arguments)
    except StoreError as error:
        console = Console(stderr=True, style="bold red", highlight=False)
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
