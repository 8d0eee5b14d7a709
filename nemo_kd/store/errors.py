"""The one error of the store: its message names the thing, both values and what to do."""


class StoreError(ValueError):
    """A store that is missing, unfinished, damaged, or made for another configuration."""
