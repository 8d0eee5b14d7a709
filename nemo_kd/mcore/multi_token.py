"""Refuse models with Megatron's layers for multi-token prediction (MTP)."""

from __future__ import annotations

from typing import Any

from nemo_kd.errors import NemoKDError

NO_TEACHER = "multi-token prediction has no teacher"


def refuse_multi_token(config: Any, name: str = "mtp_num_layers") -> None:
    """Refuse a model whose `TransformerConfig` has MTP layers; `name` is its setting in messages.

    Megatron adds the layers' loss on all tokens, prompts and padding included, by the function
    that the distillation replaces. A teacher's hidden states would be followed by those of the MTP
    layers.

    Errors: NemoKDError.
    """
    layers = getattr(config, "mtp_num_layers", None)
    if layers:
        raise NemoKDError(
            f"{name}={layers}: {NO_TEACHER}, and Megatron would add a loss of its own; set it to "
            "None"
        )
