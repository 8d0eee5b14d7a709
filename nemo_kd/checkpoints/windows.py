"""The sliding window of transformers' configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_kd.checkpoints.settings import SettingsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def fix_windows(config: PretrainedConfig) -> None:
    """Take away a window that the settings turn off, which transformers 4.51 would mask with.

    `max_window_layers`: the first layer with a window. Raises SettingsError if it is between the
    first and the last: transformers 4.51 gives the window to all.
    """
    first = first_with_window(config)
    if first is None or getattr(config, "sliding_window", None) is None:
        return
    if getattr(config, "layer_types", None):  # transformers 4.53 masks each layer by its type
        return
    if not config.use_sliding_window or first >= config.num_hidden_layers:
        config.sliding_window = None
    elif first > 0:
        raise SettingsError(
            f"max_window_layers={first} gives a sliding window to some of the "
            f"{config.num_hidden_layers} layers, and this version to all"
        )


def first_with_window(config: PretrainedConfig) -> Any:
    """Return the first layer with a window, for Qwen's; None for others."""
    # transformers 5 gives it to all layers of this one.
    return 0 if config.model_type == "qwen3_moe" else getattr(config, "max_window_layers", None)
