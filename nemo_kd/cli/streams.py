"""The standard streams of a command: open, and able to write every name."""

from __future__ import annotations

import io
import os
import sys


def prepare_streams() -> None:
    """Open the streams that the caller has closed (`>&-`) on /dev/null; escape what is not ASCII.

    Python sets a closed stream to None, which has no methods, and the next file to be opened would
    get its descriptor and with it what libraries write to descriptors 1 and 2.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
            setattr(sys, name, stream)
            if stream.fileno() <= 2:
                os.set_inheritable(stream.fileno(), True)  # as every standard stream
        if name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale of ASCII
