"""What the jobs that Hydra configures share: arguments, help, quiet logs, errors in one line."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser  # the one that hydra.main parses with
from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli.failures import reported
from nemo_kd.cli.hydra_errors import check_overrides
from nemo_kd.cli.overrides import accept_every_spelling

NOT_COMPOSED = (
    "help",
    "hydra_help",
    "info",
    "multirun",
    "shell_completion",
    "experimental_rerun",
)
"""Options of Hydra's without which there is one configuration to compose."""


def commented(conf: Path, *names: str) -> str:
    """The files `conf/NAME.yaml` for a script's help: with comments, without Hydra's settings."""
    texts = {name: (conf / f"{name}.yaml").read_text().partition("\nhydra:\n")[0] for name in names}
    shown = "\n\n".join(f"# --- conf/{name}.yaml\n{text}" for name, text in texts.items())
    return shown.replace("$", "$$")  # Hydra's template gives one of them back


def script(job: Callable[[DictConfig], None], conf: Path, name: str, resume: str) -> None:
    """Run `job` with the configuration `conf`/`name`.yaml and the overrides in `sys.argv`.

    A user's error is one line without a traceback. `resume` says what the same command does after
    Ctrl-C, whose exit status is 130.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = accept_every_spelling(sys.argv[1:])
    _quiet()
    OmegaConf.register_new_resolver("commented", functools.partial(commented, conf), replace=True)
    # NeMo's own, which its configurations use before NeMo is imported.
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)

    def run(cfg: DictConfig) -> None:
        try:
            with reported(resume):
                job(cfg)
        except Exception:
            traceback.print_exc()  # all of it: Hydra would leave frames out
            sys.exit(1)

    with reported(resume):
        check_composition(conf, name, sys.argv[1:])
        hydra.main(version_base=None, config_path=str(conf), config_name=name)(run)()


def check_composition(conf: Path, name: str, arguments: list[str]) -> None:
    """Compose the configuration that `hydra.main` will compose, which reports errors its own way.

    Errors: Hydra's and OmegaConf's; NemoKDError for a value that would be a sweep.
    """
    given = get_args_parser().parse_args(arguments)
    if any(getattr(given, option) for option in NOT_COMPOSED):
        return
    overrides = list(given.overrides)
    check_overrides(overrides)
    if given.config_dir is not None:
        overrides.append(f"hydra.searchpath=[file://{Path(given.config_dir).absolute()}]")
    conf = conf if given.config_path is None else Path(given.config_path)
    with hydra.initialize_config_dir(str(conf.absolute()), version_base=None):
        hydra.compose(given.config_name or name, overrides)


def _quiet() -> None:
    """Ask no hub, and silence imports' warnings about what a run does not use."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
