"""Megatron-LM's arguments as settings: converted, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.mcore.arguments import settings_of_arguments

STORED: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "group_query_attention": True,
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True,
    "ffn_hidden_size": 96,
    "norm_epsilon": 1e-6,
    "lr": 1e-4,
    "recompute_granularity": "full",
    "moe_router_load_balancing_type": "aux_loss",
    "initial_loss_scale": 2.0**32,
    "loss_scale_window": 1000,
    "mtp_loss_scaling_factor": 0.1,
    "muon_scale_mode": "spectral",
    "tensor_model_parallel_size": 8,
    "encoder_num_layers": 4,  # which Megatron-LM always sets
    "retro_attention_gate": 1,  # its default up to 0.13
}


def test_arguments_become_settings() -> None:
    settings = settings_of_arguments("c", STORED, {"rotary_base": 500000})
    assert settings.config["num_query_groups"] == 2 and settings.config["kv_channels"] == 16
    assert settings.config["layernorm_epsilon"] == 1e-6 and not settings.tied
    assert settings.config["activation_func"] is torch.nn.functional.silu
    assert settings.rope.base == 500000 and settings.max_positions is None


def test_a_gpt_of_megatrons_defaults() -> None:
    """LayerNorm, GELU, biases and learned positions, which limit the length of rows."""
    own = {"position_embedding_type": "learned_absolute", "normalization": "LayerNorm"}
    changes = {"swiglu": False, "group_query_attention": False, "ffn_hidden_size": None}
    settings = settings_of_arguments("c", {**STORED, **own, **changes}, {})
    assert settings.config["ffn_hidden_size"] == 256 and settings.config["num_query_groups"] == 4
    assert settings.config["add_bias_linear"] and settings.max_positions == 128


def test_the_older_flag_for_rotary_positions_changes_nothing() -> None:
    """Megatron-LM saves it beside position_embedding_type, which it sets."""
    found = settings_of_arguments("c", {**STORED, "use_rotary_position_embeddings": True}, {})
    assert found == settings_of_arguments("c", STORED, {})
    assert found.position_embedding_type == "rope"


EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 32}
BALANCING = "moe_router_load_balancing_type"


@pytest.mark.parametrize("kind", ["none", "seq_aux_loss", ["aux_loss", "global_aux_loss"]])
def test_a_loss_that_balances_the_experts_does_not_change_the_router(kind: Any) -> None:
    found = settings_of_arguments("c", {**STORED, **EXPERTS, BALANCING: kind}, {})
    assert found == settings_of_arguments("c", {**STORED, **EXPERTS}, {})
    assert found.config[BALANCING] == "aux_loss" and found.config["moe_aux_loss_coeff"] == 0


@pytest.mark.parametrize("kind", ["sinkhorn", ["aux_loss", "sinkhorn"], "of_next_year"])
def test_another_router_is_refused_and_does_not_matter_without_experts(kind: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"{BALANCING}=.*routes tokens to other experts"):
        settings_of_arguments("c", {**STORED, **EXPERTS, BALANCING: kind}, {})
    found = settings_of_arguments("c", {**STORED, BALANCING: kind}, {})
    assert found == settings_of_arguments("c", STORED, {})


@pytest.mark.parametrize(
    ("stored", "given", "message"),
    [
        ({"num_layers": None}, {}, "lacks Megatron-LM's arguments num_layers"),
        ({}, {"num_layers": 5}, "its argument num_layers is 4, but teacher.arguments.num_layers"),
        ({}, {"layers": 5}, "teacher.arguments.layers is not an argument"),
        ({"multi_latent_attention": True}, {}, "multi_latent_attention=True is not supported"),
        ({"moe_shared_expert_intermediate_size": 8}, {}, "is not supported"),
        ({"attention_of_next_year": 3}, {}, "attention_of_next_year=3 is not supported"),
        ({"embedding_multiplier": 12.0}, {}, "embedding_multiplier=12.0 is not supported"),
        ({"encoder_num_layers": 2}, {}, "encoder_num_layers=2 is not supported"),
        ({"position_embedding_type": "yarn"}, {}, "position_embedding_type='yarn'"),
        ({"rotary_percent": 2.0}, {}, "c: its arguments"),
    ],
)
def test_what_is_missing_unknown_or_unsupported_is_refused(
    stored: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        settings_of_arguments("c", {**STORED, **stored}, given)
