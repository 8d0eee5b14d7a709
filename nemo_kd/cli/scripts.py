"""What the Hydra scripts share: readable overrides, help, quiet logs, errors in one line."""

from __future__ import annotations

import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli.failures import INTERRUPTED, explain, is_interrupt, say_last
from nemo_kd.cli.overrides import accept_every_spelling

TRACEBACK = "NEMO_KD_TRACEBACK"


def commented(conf: Path, *names: str) -> str:
    """The files `conf/NAME.yaml` as a script's help shows them: with comments, without Hydra's
    own settings."""
    texts = {name: (conf / f"{name}.yaml").read_text().partition("\nhydra:\n")[0] for name in names}
    shown = "\n\n".join(f"# --- conf/{name}.yaml\n{text}" for name, text in texts.items())
    return shown.replace("$", "$$")  # Hydra's template gives one of them back


def script(
    main: Callable[[], None],
    resume: str = "run the same command to resume",
    conf: Path | None = None,
) -> None:
    """Run a Hydra entry point; report a user's mistake in one line, without a traceback.

    `resume` says what the same command does after Ctrl-C, whose exit status is 130; `conf` has
    the configurations that `--help` shows.
    """
    sys.argv[1:] = accept_every_spelling(sys.argv[1:])
    _quiet()
    if conf is not None:
        shown = functools.partial(commented, conf)
        OmegaConf.register_new_resolver("commented", shown, replace=True)
    # NeMo's own, which its configurations use before NeMo is imported.
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except BaseException as error:
        if is_interrupt(error) and not os.environ.get(TRACEBACK):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another one
            say_last(f"interrupted: {resume}")
            sys.exit(INTERRUPTED)
        _end_in_one_line(error)
        raise


def one_line_errors(job: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Decorate what `hydra.main` decorates: Hydra writes lines of its own about any exception."""

    @functools.wraps(job)
    def reporting(cfg: DictConfig) -> None:
        try:
            job(cfg)
        except Exception as error:
            _end_in_one_line(error)
            raise

    return reporting


def _end_in_one_line(error: BaseException) -> None:
    """Exit with status 1 if the error is a user's mistake; return if its traceback is wanted."""
    line = None if os.environ.get(TRACEBACK) else explain(error)
    if line is not None:
        say_last(f"error: {line} ({TRACEBACK}=1 shows where)")
        sys.exit(1)


def _quiet() -> None:
    """No hub is asked, and imports do not warn of things that a run does not use."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")


__all__ = ["accept_every_spelling", "one_line_errors", "script"]
