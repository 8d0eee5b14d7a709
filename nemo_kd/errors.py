"""Base classes of the errors that a user of nemo-kd can fix."""

from __future__ import annotations


class NemoKDError(ValueError):
    """A mistake in settings, data or files; the message names it and how to fix it."""


class StoreError(NemoKDError):
    """A store that is missing, unfinished, damaged, or made for another configuration."""
