"""Errors that a user of nemo-kd can fix: base classes, and what to do on a full disk."""

from __future__ import annotations

import errno

FULL = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f, or that of the file system)",
}
"""Errors of a full disk → what to do."""


class NemoKDError(ValueError):
    """A mistake in settings, data or files; the message names it and how to fix it."""


class StoreError(NemoKDError):
    """A store that is missing, unfinished, damaged, or made for another configuration."""
