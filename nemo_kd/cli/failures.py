"""Report user errors in one line, the last on the screen; other errors keep their traceback.

Under torchrun, one rank per node reports. Because torchrun prints its own traceback after its
processes have failed, a small helper process waits for torchrun to exit and then writes the line.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_kd.errors import FULL, NemoKDError
from nemo_kd.visible import visible

TRACEBACK = "NEMO_KD_TRACEBACK"
PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
)
REMEDIES = {
    errno.EACCES: "give this user access to it, or choose another path",
    errno.EISDIR: "give the path of a file",
    errno.EIO: "the disk or the network file system failed; try again, or copy the file elsewhere",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EROFS: "choose a path that can be written",
    **FULL,
}
NEMOS_ERRORS = {"MisconfigurationException", "NeMoBaseException"}
MAX_LINE = 4000  # characters of a message
INTERRUPTED = 130  # 128 + SIGINT, the exit status that shells expect
WRITER = """
import os, select, sys
try:
    descriptor = os.pidfd_open(int(sys.argv[1]))
    select.select([descriptor], [], [], 60)
except OSError:
    pass
os.write(2, sys.argv[2].encode(errors="replace"))
"""
"""Program that waits for the process with pid argv[1] to end, then writes argv[2] to stderr."""


@contextmanager
def reported(resume: str = "") -> Iterator[None]:
    """Context manager that exits with a one-line message on a user error (1) or Ctrl-C (130).

    `resume` is appended to the message after Ctrl-C and describes what rerunning the command does.
    All other errors propagate, and with NEMO_KD_TRACEBACK=1 every error does.
    """
    try:
        yield
    except BaseException as error:
        if os.environ.get(TRACEBACK):
            raise
        if is_interrupt(error):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends a second SIGINT
            write_last(f"interrupted: {resume}" if resume else "interrupted")
            sys.exit(INTERRUPTED)
        line = explain(error)
        if line is None:
            raise
        write_last(f"error: {line} ({TRACEBACK}=1 shows where)")
        sys.exit(1)


def explain(error: BaseException) -> str | None:
    """Return the message of a user error; None for any other error."""
    if isinstance(error, NemoKDError):
        return str(error)
    classes = type(error).__mro__
    if any(cls.__module__.split(".")[0] in ("hydra", "omegaconf") for cls in classes):
        from nemo_kd.cli import hydra_errors

        return hydra_errors.explain(error)
    if any(cls.__module__.split(".")[0] == "yaml" for cls in classes):
        from nemo_kd.cli import hydra_errors

        return hydra_errors.explain_yaml(error)
    if isinstance(error, OSError):
        return _of_a_path(error)
    if {cls.__name__ for cls in classes} & NEMOS_ERRORS:
        return str(error) or type(error).__name__
    return None


def _of_a_path(error: OSError) -> str | None:
    if not isinstance(error, PATH_ERRORS) and error.errno not in DISK_ERRORS:
        return None
    path = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{path}{(error.strerror or str(error)).lower()}{f'; {remedy}' if remedy else ''}"


def is_interrupt(error: BaseException | None) -> bool:
    """Return whether an error is Ctrl-C or the SystemExit into which Lightning converts it.

    A SystemExit with status 130 does not count: it has been reported already.
    """
    while isinstance(error, SystemExit) and error.code != INTERRUPTED:
        error = error.__context__
    return isinstance(error, KeyboardInterrupt)


def write_last(line: str) -> None:
    """Write a line to stderr; under torchrun, from one rank per node and after its output."""
    text = visible(" ".join(line.split("\n")))
    if len(text) > MAX_LINE:  # a name from a file may be megabytes long
        text = f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
    text += "\n"
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    launcher = os.getppid()
    if error_file is None:
        sys.stderr.write(text)
    elif _is_first(Path(error_file).parent.parent / "nemo_kd_said"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent by torchrun if another rank ends first
        if launcher == 1:  # torchrun is the container's init process: nothing outlives it
            sys.stderr.write(text)
        else:
            subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", WRITER, str(launcher), text],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
            )
    sys.stderr.flush()


def _is_first(marker: Path) -> bool:
    """Create the marker file; return whether this rank is the first of the launch to do so."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return True
