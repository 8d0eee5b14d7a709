"""One-line messages for errors raised by Hydra, OmegaConf and PyYAML."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from nemo_kd.errors import NemoKDError
from nemo_kd.spelling import did_you_mean


def explain(error: BaseException) -> str:
    """Return a one-line message for an error raised by Hydra or OmegaConf."""
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        return _of_grammar(error.override)
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        key = str(cause.full_key or cause.key)
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            return f"{key} is unknown{_nearest(cause, key)}"
        error = cause  # such as a brace that is missing
    if isinstance(error, OmegaConfBaseException):
        where = f"{error.full_key}: " if error.full_key else ""
        return where + str(error).splitlines()[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4]).partition(" Config search path:")[0]


def explain_yaml(error: YAMLError) -> str:
    """Return a one-line message for a file that is not YAML, with its name and line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # it names the file, if at all, in its text
        return " ".join(str(error).split())
    return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: {_problem(error)}"


def _problem(error: YAMLError) -> str:
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces"
    return f"{problem}; give the key once" if "duplicate key" in problem else problem


def check_overrides(overrides: list[str]) -> None:
    """Raise NemoKDError for a comma-separated value that Hydra would interpret as a sweep.

    An argument that does not match Hydra's grammar raises Hydra's own error.
    """
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            key, value = override.key_or_group, override.get_value_string()
            raise NemoKDError(
                f"{key}={value}: for a list write '{key}=[{value}]', for a text '{key}=\"{value}\"'"
            )


def _of_grammar(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"cannot read the argument {override!r}: expected key=value"
    return (
        f"cannot read the argument {override!r}: quote the value, once for Hydra and once for the "
        f"shell, such as '{key}=\"{value}\"'"
    )


def _nearest(cause: OmegaConfBaseException, key: str) -> str:
    """Suggest the most similar key of the block in which Hydra did not find `key`."""
    known = map(str, cause.parent_node) if isinstance(cause.parent_node, DictConfig) else ()
    block = key.rpartition(".")[0]
    return did_you_mean(str(cause.key), known, prefix=f"{block}." if block else "")
