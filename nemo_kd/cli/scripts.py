"""Shared start-up of the Hydra jobs: overrides, help, quiet logs and one-line errors."""

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
from hydra._internal.utils import get_args_parser  # the parser that hydra.main uses
from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli.failures import reported
from nemo_kd.cli.hydra_errors import check_overrides
from nemo_kd.cli.overrides import accept_every_spelling, repeated
from nemo_kd.cli.streams import prepare_streams
from nemo_kd.errors import NemoKDError
from nemo_kd.visible import say

NOT_COMPOSED = (
    "help",
    "hydra_help",
    "info",
    "multirun",
    "shell_completion",
    "experimental_rerun",
)
"""Hydra options with which the configuration is not composed in advance."""


def commented(conf: Path, *names: str) -> str:
    """Return the commented files `conf/NAME.yaml`, without the block `hydra`, for --help."""
    files = {name: (conf / f"{name}.yaml").read_text(encoding="utf-8") for name in names}
    texts = {name: text.partition("\nhydra:\n")[0] for name, text in files.items()}
    shown = "\n\n".join(f"# --- conf/{name}.yaml\n{text}" for name, text in texts.items())
    return shown.replace("$", "$$")  # Hydra's help template reduces `$$` to `$`


def script(job: Callable[[DictConfig], None], conf: Path, name: str, resume: str) -> None:
    """Run `job` with the configuration `conf`/`name`.yaml and the overrides in `sys.argv`.

    User errors are reported in one line, without a traceback. After Ctrl-C the exit status is 130
    and the message includes `resume`, which describes what rerunning the command does.
    """
    # Python's own, which the other commands of `nemo-kd` replace: sockets must not kill a job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    prepare_streams()
    with reported():
        refuse_undecoded(sys.argv[1:])
    for line in repeated(sys.argv[1:]):
        say(line)
    sys.argv[1:] = accept_every_spelling(sys.argv[1:])
    _quiet()
    OmegaConf.register_new_resolver("commented", functools.partial(commented, conf), replace=True)
    # Defined by NeMo and used in its configurations, but needed here before NeMo is imported.
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)

    def run(cfg: DictConfig) -> None:
        try:
            with reported(resume):
                job(cfg)
        except Exception:
            traceback.print_exc()  # in full: Hydra would omit frames
            sys.exit(1)

    with reported(resume):
        check_composition(conf, name, sys.argv[1:])
        hydra.main(version_base=None, config_path=str(conf), config_name=name)(run)()


def refuse_undecoded(arguments: list[str]) -> None:
    """Raise NemoKDError for an argument with bytes that could not be decoded: no JSON holds them.

    This happens in a locale of ASCII, or with a name that is not in UTF-8.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            readable = os.fsencode(argument).decode("utf-8", "backslashreplace")
            raise NemoKDError(
                f"the argument {readable} has characters outside this process's encoding, "
                f"{sys.getfilesystemencoding()}: run the command with LC_ALL=C.UTF-8 and without "
                "PYTHONUTF8=0, or rename what it names"
            ) from None


def check_composition(conf: Path, name: str, arguments: list[str]) -> None:
    """Compose the configuration in advance, because `hydra.main` reports errors in its own way.

    Raises the errors of Hydra and OmegaConf, and NemoKDError for a value that would be a sweep.
    """
    given = get_args_parser().parse_args(arguments)
    if any(getattr(given, option) for option in NOT_COMPOSED):
        return
    overrides = list(given.overrides)
    check_overrides(overrides)
    if given.config_dir is not None:
        overrides.append(f"hydra.searchpath=[file://{Path(given.config_dir).absolute()}]")
    conf = conf if given.config_path is None else Path(given.config_path)
    try:
        with hydra.initialize_config_dir(str(conf.absolute()), version_base=None):
            hydra.compose(given.config_name or name, overrides)
    except UnicodeDecodeError as error:
        raise NemoKDError(
            f"a configuration file of {given.config_name or name} in {conf} is not in UTF-8 "
            f"({error}); convert it"
        ) from error


def _quiet() -> None:
    """Disable Hugging Face hub access, and silence import-time warnings about unused features."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
