"""`nemo-kd`: inspect, check and transform stores, size a dump, examine the environment.

Commands import what they need when they run: `--help` and `inspect` answer at once. Results go to
standard output, progress and errors to standard error. Exit status: 0 success, 1 an error or
problems found, 2 a wrong command line, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main(arguments: list[str] | None = None) -> None:
    """Entry point; None takes the process's own arguments. Users' errors are one line."""
    if arguments is None:
        _own_the_process()
    try:
        from rich.console import Console

        from nemo_kd.cli import doctor, look, make, plan, run  # noqa: F401 (each adds commands)
        from nemo_kd.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "rich", "typer"):
            raise
        sys.exit(f"error: {error.name} is not installed: pip install 'nemo-kd[cli]'")
    from nemo_kd.errors import StoreError

    try:
        app(arguments)
    except (StoreError, OSError) as error:
        text = str(error) if isinstance(error, StoreError) else _system_error(error)
        console = Console(stderr=True, style="bold red", highlight=False)
        console.print(f"error: {text}", markup=False, soft_wrap=True)
        sys.exit(1)


def _own_the_process() -> None:
    """Settings of a process that is nemo-kd's alone: signals, encoding, no hub."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program, as it ends cat
    signal.signal(signal.SIGINT, _interrupted)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def _interrupted(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the message
    print("\ninterrupted", file=sys.stderr)
    sys.exit(128 + number)


def _system_error(error: OSError) -> str:
    """`PATH: reason`, without Python's `[Errno N]`."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"
