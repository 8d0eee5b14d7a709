"""A user's mistake as one line, the last on the screen; every other error keeps its traceback.

Under torchrun one rank of a node speaks. torchrun itself prints a traceback of its own once its
processes have failed, so that the line is written after it, by a small process that waits for it.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

DISKS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
OF_NEMOS_CHECKS = {"MisconfigurationException", "NeMoBaseException"}
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
AFTER = """
import os, select, sys
try:
    descriptor = os.pidfd_open(int(sys.argv[1]))
    select.select([descriptor], [], [], 60)
except OSError:
    pass
os.write(2, sys.argv[2].encode(errors="replace"))
"""


def explain(error: BaseException) -> str | None:
    """What the user is told of an error; None for one that is no user's mistake."""
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return _of_a_path(error)
    if isinstance(error, HydraException):
        return _of_hydra(error)
    if isinstance(error, OmegaConfBaseException):
        where = f"{error.full_key}: " if error.full_key else ""
        return where + str(error).splitlines()[0]
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, ValueError) or names & OF_NEMOS_CHECKS:
        return str(error) or type(error).__name__
    return None


def _of_a_path(error: OSError) -> str | None:
    kinds = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError)
    if not isinstance(error, (*kinds, NotADirectoryError)) and error.errno not in DISKS_ERRORS:
        return None
    if error.errno is None:  # our own, which says all
        return str(error)
    path = f"{error.filename}: " if error.filename else ""
    hint = ""
    if ".idx." in str(error.filename):
        hint = (
            "; set index_mapping_dir of its data block (data, model.data.train_ds, "
            "model.data.validation_ds) to a directory that can be written"
        )
    return f"{path}{(error.strerror or str(error)).lower()}{hint}"


def _of_hydra(error: HydraException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        return _of_grammar(error.override)
    if found := re.match(r"Ambiguous value for argument '(?:\+*)(.*?)=(.*)'", lines[0]):
        key, value = found.groups()
        return (
            f"{key}={value}: for a list write '{key}=[{value}]', for one text '{key}=\"{value}\"'"
        )
    if found := re.match(r"Could not override '(.*)'", lines[0]):
        return f"{found[1]} is unknown{_near(error.__cause__, found[1])}"
    return " ".join(lines[:4]).partition(" Config search path:")[0]


def _of_grammar(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"cannot read the argument {override!r}: expected key=value"
    return (
        f"cannot read the argument {override!r}: quote the value, once for Hydra and once for the "
        f"shell, such as '{key}=\"{value}\"'"
    )


def _near(cause: Any, key: str) -> str:
    """The nearest key of the block that Hydra did not find `key` in."""
    parent = getattr(cause, "parent_node", None)
    known: Iterable[str] = map(str, parent) if isinstance(parent, DictConfig) else ()
    missing = str(getattr(cause, "key", key))
    near = difflib.get_close_matches(missing, list(known), n=1)
    where = str(getattr(cause, "full_key", None) or key).rpartition(".")[0]
    return f"; did you mean {where + '.' if where else ''}{near[0]}?" if near else ""


def is_interrupt(error: BaseException) -> bool:
    """Ctrl-C: itself, or what Lightning makes of it in the middle of a training."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        if not isinstance(error, SystemExit):
            return False
        error = error.__context__  # type: ignore[assignment]
    return False


def say_last(line: str) -> None:
    """Write a line to stderr: by one rank of a node, and after all that torchrun writes."""
    text = " ".join(line.split("\n")) + "\n"
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    launcher = os.getppid()
    if error_file is None:
        sys.stderr.write(text)
    elif _is_first(Path(error_file).parent.parent / "nemo_kd_said"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, when another rank ends first
        if launcher == 1:  # torchrun is the container's first process: nothing outlives it
            sys.stderr.write(text)
        else:
            subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", AFTER, str(launcher), text],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
            )
    sys.stderr.flush()


def _is_first(marker: Path) -> bool:
    """Whether no other rank of this start has made the file."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return True
