"""Entry point of `nemo-kd`: inspect and transform stores, plan and run jobs, check the environment.

Commands import their dependencies only when they run, so that `--help` and `inspect` respond
immediately. Results go to standard output, progress and errors to standard error. Exit status: 0
success, 1 an error or problems found, 2 an invalid command line, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from nemo_kd.cli.failures import INTERRUPTED, reported
from nemo_kd.cli.streams import prepare_streams
from nemo_kd.extras import install


def main(arguments: list[str] | None = None) -> None:
    """Run `nemo-kd` with `arguments`, by default those in `sys.argv`.

    User errors are reported in one line. Without `arguments`, also sets the process's signal
    handlers and environment.
    """
    if arguments is None:
        _own_the_process()
    try:
        from nemo_kd.cli import (  # noqa: F401 (each adds commands)
            doctor,
            export,
            look,
            make,
            plan,
            remote,
            run,
        )
        from nemo_kd.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("msgspec", "numpy", "rich", "typer"):
            raise
        sys.exit(f"error: {error.name} is not installed: {install('cli')}")
    with reported():
        app(arguments)


def _own_the_process() -> None:
    """Set up a dedicated process: signal handlers, output encoding, no Hugging Face hub access."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    signal.signal(signal.SIGINT, _interrupted)
    prepare_streams()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def _interrupted(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the message
    print("\ninterrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)
