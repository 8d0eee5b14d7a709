"""The arguments `key=value` of a Hydra script, so that a user need not know Hydra's grammar."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

OVERRIDE = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)
OTHER_CONFIGURATION = {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
AS_OURS = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
]
"""What the YAML files of conf/ set of Hydra itself: no directory and no log of its own."""
SINGLE = {"output", "output_dir", "name", "jsonl", "overwrite"}
"""Keys outside any block that may be missing in a configuration of NeMo's own."""
PATHS = {
    "restore_from_path",
    "file_path",
    "output",
    "output_dir",
    "index_mapping_dir",
    "explicit_log_dir",
    "exp_dir",
    "output_file_path_prefix",
    "vocab_file",
    "merge_file",
}
PATH_LISTS = {"store", "file_names"}
TEXTS = {"prompt_template", "pattern", "label_key", "truncation_field"}


def accept_every_spelling(arguments: list[str]) -> list[str]:
    """The arguments as Hydra reads them in the way that was meant.

    `+a.b=x`, `a.b=x` and `++a.b=x` all become the last: plain Hydra refuses `+` for a key that the
    YAML has and the bare form for one that it lacks. Unknown keys are refused later, by name.
    A path or a text with a character that Hydra's grammar does not know is quoted. Groups
    (`hydra/x=`), `hydra.x=`, `~x` and options are left alone.
    """
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    arguments = [_override(argument, sweeps) for argument in _with_config_path(arguments)]
    if not OTHER_CONFIGURATION & {argument.partition("=")[0] for argument in arguments}:
        return arguments
    given = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    added = [each for each in AS_OURS if each.partition("=")[0] not in given]
    # Among the overrides, which Hydra wants to be in one row.
    first = (i for i, each in enumerate(arguments) if OVERRIDE.fullmatch(each))
    at = next(first, len(arguments))
    return [*arguments[:at], *added, *arguments[at:]]


def _override(argument: str, sweeps: bool) -> str:
    found = OVERRIDE.fullmatch(argument)
    if found is None or found[2].split(".")[0] == "hydra":
        return argument
    plus, key, value = found.groups()
    if "." in key or key in SINGLE:
        plus = "++"
    return f"{plus}{key}={value if sweeps else readable(key, value)}"


def given_keys() -> set[str]:
    """The keys that the running script's command line sets."""
    if not HydraConfig.initialized():
        return set()
    overrides = HydraConfig.get().overrides.task
    return {override.lstrip("+").partition("=")[0] for override in overrides}


def readable(key: str, value: str) -> str:
    """A value that Hydra's grammar reads as the text that it is, quoted if need be."""
    name = key.rpartition(".")[2]
    is_path = name in PATHS or name in PATH_LISTS
    if is_path and value.startswith("~/"):
        value = os.path.expanduser(value)
    if not value or value in ("null", "???") or _is_quoted(value) or "${" in value:
        return value
    if value.startswith("[") and value.endswith("]"):
        return value if _parses(value) else _quoted_list(value)
    is_text = name in PATHS or name in TEXTS or (name in PATH_LISTS and _is_one_path(value))
    if is_text and not ("\\" in value and _parses(value)):  # escaped as Hydra has it
        return quoted(value)
    return value if value.startswith("{") or _parses(value) else quoted(value)


def quoted(text: str) -> str:
    """In Hydra's quotes: `'` and the backslashes before it, or at the end, are escaped."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (m[2] and "\\'"), text) + "'"


def _is_one_path(value: str) -> bool:
    """Without a comma, or with one that is a part of a file's name."""
    return "," not in value or os.path.exists(value)


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] in "'\"" and value[-1] == value[0] and _parses(value)


def _parses(value: str) -> bool:
    try:
        OverridesParser.create().parse_override(f"x={value}").value()
    except HydraException:
        return False
    return True


def _quoted_list(value: str) -> str:
    """`[a b,c]` with each entry quoted that is not; commas part the entries."""
    entries = [entry.strip() for entry in value[1:-1].split(",")]
    return f"[{','.join(each if _is_quoted(each) else quoted(each) for each in entries)}]"


def _with_config_path(arguments: list[str]) -> Iterator[str]:
    """`--config-path DIR` below the working directory, which Hydra takes below the script's."""
    before = ""
    for argument in arguments:
        if before in ("--config-path", "-cp") and os.path.isdir(argument):
            argument = os.path.abspath(argument)
        elif argument.startswith("--config-path=") and os.path.isdir(argument[14:]):
            argument = f"--config-path={os.path.abspath(argument[14:])}"
        yield argument
        before = argument
