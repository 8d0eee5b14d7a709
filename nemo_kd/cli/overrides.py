"""Rewrite `key=value` arguments, so that users need not know Hydra's override grammar."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nemo_kd.paths import expand_home
from nemo_kd.settings.paths import PATH_LISTS, PATHS

OTHER_CONFIGURATION = {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
DIRECTORIES = {"--config-path", "-cp", "--config-dir", "-cd"}
AS_OURS = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
]
"""Hydra's settings in the YAML files of conf/: Hydra creates no directory and no log file."""
SINGLE = {"output", "output_dir", "name", "jsonl", "overwrite"}
"""Top-level keys that a NeMo configuration given by the user may lack."""
TEXTS = {"prompt_template", "label_key", "truncation_field"}
LITERAL = {"pattern"}
"""Regular expressions: their backslashes, brackets and commas are never Hydra's."""


def accept_every_spelling(arguments: list[str]) -> list[str]:
    """Rewrite arguments so that Hydra accepts every spelling of an override.

    `+a.b=x`, `a.b=x` and `++a.b=x` all become `++a.b=x`: Hydra rejects `+` for keys in the YAML and
    the bare form for keys not in it. Unknown keys are reported later, by the configuration checks.
    Paths and texts with characters outside Hydra's grammar are quoted. Groups (`hydra/x=`),
    `hydra.x=`, `~x` and options are unchanged.
    """
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    arguments = [_override(argument, sweeps) for argument in _with_config_path(arguments)]
    if not OTHER_CONFIGURATION & {argument.partition("=")[0] for argument in arguments}:
        return arguments
    given = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    added = [each for each in AS_OURS if each.partition("=")[0] not in given]
    # Insert next to the overrides: Hydra does not allow options between two overrides.
    first = (i for i, each in enumerate(arguments) if _key(each) is not None)
    at = next(first, len(arguments))
    return [*arguments[:at], *added, *arguments[at:]]


def repeated(arguments: list[str]) -> Iterator[str]:
    """Yield a line for each key that is given more than once, of which Hydra takes the last.

    Also for keys of a block that is given after them, which replaces them: `a.b=1 a=null`.
    """
    given: dict[str, list[str]] = {}
    for argument in arguments:
        if (key := _key(argument)) is not None:
            name, value = key.key_or_group, argument.partition("=")[2]
            lost = [each for each in given if each.startswith(f"{name}.")]
            if lost and not value.startswith("{"):  # Hydra merges a block into the one that exists
                yield f"{', '.join(lost)}: no effect, because {name}={value} is given after it"
            given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(values) > 1:
            often = "twice" if len(values) == 2 else f"{len(values)} times"
            yield f"{name} is given {often}: {values[-1]} is used"


def _override(argument: str, sweeps: bool) -> str:
    key, value = _key(argument), argument.partition("=")[2]
    if key is None or key.key_or_group.split(".")[0] == "hydra":
        return argument
    name = key.key_or_group
    plus = {OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++"}.get(key.type, "")
    if "." in name or name in SINGLE:
        plus = "++"
    return f"{plus}{name}={value if sweeps else readable(name, value)}"


def _key(argument: str) -> Override | None:
    """Parse the part before `=`; return None for options, groups, packages and deletions."""
    before, equals, _ = argument.partition("=")
    try:
        key = OverridesParser.create().parse_override(f"{before}=x")
    except HydraException:
        return None
    plain = equals and key.package is None and "/" not in key.key_or_group
    return key if plain and not key.is_delete() else None


def given_keys() -> set[str]:
    """Return the keys set on the command line of the running Hydra script."""
    if not HydraConfig.initialized():
        return set()
    # Unresolved: an interpolation in an argument is that of a setting, whose check names it.
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return {str(override).lstrip("+").partition("=")[0] for override in overrides or ()}


def readable(key: str, value: str) -> str:
    """Return the value, quoted if Hydra would otherwise not parse it as the literal text.

    A path or text whose special characters are all escaped for Hydra stays unquoted, unless a
    file of that name exists; a prompt template with plain braces is therefore always quoted.
    """
    name = key.rpartition(".")[2]
    is_path = name in PATHS or name in PATH_LISTS
    if is_path:
        value = expand_home(value)
    if not value or value in ("null", "???") or _is_quoted(value):
        return value
    if "${" in value:  # Hydra does not parse one within another
        return value if value[0] in "[{" or _parses(value) else quoted(value)
    if name in LITERAL or (is_path and "\\" in value and os.path.exists(value)):
        return quoted(value)
    if value.startswith("[") and value.endswith("]"):
        return value if _parses(value) else _quoted_list(value)
    is_text = name in PATHS or name in TEXTS or (name in PATH_LISTS and _is_one_path(value))
    if is_text and not ("\\" in value and _parses(value)):  # already escaped for Hydra
        return quoted(value)
    return value if value.startswith("{") or _parses(value) else quoted(value)


def quoted(text: str) -> str:
    """Quote a text for Hydra."""
    return QuotedString(text, Quote.single).with_quotes()


def _is_one_path(value: str) -> bool:
    """Return whether the value is a single path: it has no comma, or such a path exists."""
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
    """Quote the unquoted entries of a comma-separated list such as `[a b,c]`."""
    entries = [entry.strip() for entry in value[1:-1].split(",")]
    return f"[{','.join(each if _is_quoted(each) else quoted(each) for each in entries)}]"


def _with_config_path(arguments: list[str]) -> Iterator[str]:
    """Resolve `--config-path DIR` against the working directory, not the script's directory.

    A leading `~/` is replaced by the home directory, in `--config-dir` too.
    """
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if before in DIRECTORIES:
            argument = _directory(before, argument)
        elif option in DIRECTORIES and equals:
            argument = f"{option}={_directory(option, value)}"
        yield argument
        before = argument


def _directory(option: str, value: str) -> str:
    value = expand_home(value)
    is_path = option in ("--config-path", "-cp") and os.path.isdir(value)
    return os.path.abspath(value) if is_path else value
