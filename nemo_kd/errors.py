"""The base of every error that the user of nemo-kd can put right."""

from __future__ import annotations


class NemoKDError(ValueError):
    """A mistake in settings, data or files; the message names it and says what to change."""


class StoreError(NemoKDError):
    """A store that is missing, unfinished, damaged, or made for another configuration."""
