"""Every family's settings and tensors, against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from nemo_kd.checkpoints import CheckpointError, open_checkpoint
from nemo_kd.checkpoints.config_json import read_model
from nemo_kd.checkpoints.families import FAMILIES, global_parts, layer_parts
from nemo_kd.checkpoints.huggingface import to_transformers
from nemo_kd.checkpoints.nemo_file import model_config
from tests.checkpoints import models

NAMES = sorted([*models.FAMILIES, *models.ROPES])


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_all_tensors_and_give_them_back(tmp_path: Path, name: str) -> None:
    source = models.family(name)
    checkpoint = open_checkpoint(models.save(source, tmp_path))
    state = source.state_dict()
    tied = {"lm_head.weight"} if checkpoint.model.tied else set()
    parts = [*global_parts(checkpoint.model)]
    for layer in range(checkpoint.model.num_layers):
        parts += layer_parts(checkpoint.model, layer)
    names = [name for part in parts for name in part.shapes]
    assert sorted(names) == sorted(set(state) - tied)
    for part in parts:
        joined = part.join([state[name] for name in part.shapes])
        for key, tensor in zip(part.shapes, part.split(joined), strict=True):
            assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_transformers_gets_the_model_back(tmp_path: Path, name: str) -> None:
    model = models.family(name)
    checkpoint = open_checkpoint(models.save(model, tmp_path))
    ids = models.tokenizer()(models.TEXT[:100], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(to_transformers(checkpoint)(ids).logits, model(ids).logits)


def test_every_family_has_a_model_that_is_tried() -> None:
    kinds = {settings["model_type"] for settings in models.FAMILIES.values()}
    assert kinds | {"llama"} == {family.model_type for family in FAMILIES.values()}


CONFIG = {
    **models.SHARED,
    **models.MODELS["untied_llama3"],
    "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-5,
}


def of(architecture: str, **changes: Any) -> dict[str, Any]:
    config = {**CONFIG, "rope_scaling": None, "architectures": [architecture], **changes}
    return {key: value for key, value in config.items() if value is not None}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (of("LlamaForCausalLM", attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0"),
        (of("LlamaForCausalLM", head_dim=None, rope_interleaved=True), "rope_interleaved is True"),
        (of("LlamaForCausalLM", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (of("LlamaForCausalLM", rope_scaling={"type": "ntk", "factor": 2}), "rope_type is 'ntk'"),
        (of("LlamaForCausalLM", rope_scaling={"type": "linear", "factor": "4"}), "interpolation"),
        (of("Qwen2ForCausalLM", hidden_act="gelu"), "hidden_act is 'gelu'"),
        (of("Qwen3ForCausalLM", attention_bias=True), "attention_bias is True"),
        (of("Gemma2ForCausalLM"), "Gemma2ForCausalLM.*two more norms"),
        (of("GPT2LMHeadModel"), "GPT2LMHeadModel"),
        (of("Phi3ForCausalLM", resid_pdrop=0.1), "resid_pdrop is 0.1"),
        (of("NemotronForCausalLM", norm_eps=1e-5), "rms_norm_eps is 1e-05, a setting that"),
        (of("MixtralForCausalLM", num_local_experts=[4]), "Expected `int`, got `array`"),
        (
            of(
                "Qwen3MoeForCausalLM",
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=40,
                decoder_sparse_step=2,
            ),
            "decoder_sparse_step is 2",
        ),
        (
            of(
                "Phi3ForCausalLM",
                head_dim=None,
                partial_rotary_factor=0.5,
                original_max_position_embeddings=32,
                rope_scaling={
                    "type": "longrope",
                    "short_factor": [1.0] * 3,
                    "long_factor": [2.0] * 3,
                },
            ),
            "only 0.5 of each head is rotated",
        ),
    ],
)
def test_a_setting_that_would_be_lost_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model(config)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_the_default_configuration_is_read_without_a_refusal(family: Any) -> None:
    config = AutoConfig.for_model(family.model_type).to_dict()
    architecture = next(name for name, one in FAMILIES.items() if one is family)
    model = read_model({**config, "architectures": [architecture]})
    assert model.num_layers == config["num_hidden_layers"]


def test_a_file_of_transformers_5_is_read_as_it_means() -> None:
    old = read_model(CONFIG)
    new = {key: value for key, value in CONFIG.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**CONFIG["rope_scaling"], "rope_theta": CONFIG["rope_theta"]}
    new |= {"dtype": "bfloat16", "transformers_version": "5.0.0", "auto_map": {"AutoModel": "a.B"}}
    assert read_model(new) == old
    assert old.rope.base == 5e5 and old.rope.llama3 is not None


def test_a_window_is_a_setting_for_transformer_engine_or_a_limit() -> None:
    whole = of("MistralForCausalLM", max_position_embeddings=128)
    narrow = model_config(read_model({**whole, "sliding_window": 32}))
    assert (narrow["window_size"], narrow.get("max_tokens")) == ([31, 0], None)
    assert "window_size" not in model_config(read_model({**whole, "sliding_window": 128}))
    # Some layers have a window, others not: rows that fit into it only.
    mixed = {**whole, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}
    assert read_model(mixed).max_tokens is None
    assert model_config(read_model({**mixed, "use_sliding_window": True}))["max_tokens"] == 32


# --- the files of a directory ----------------------------------------------------------------


def test_files_beside_the_model_that_would_not_be_read_are_named(tmp_path: Path) -> None:
    models.save(models.llama("tied_grouped"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors would not be read"):
        open_checkpoint(tmp_path)
    (tmp_path / "other.safetensors").rename(tmp_path / "consolidated.safetensors")
    checkpoint = open_checkpoint(tmp_path)  # Mistral's own names; transformers passes it over too
    assert torch.equal(checkpoint.tensor("model.norm.weight"), tensors["model.norm.weight"])


def test_a_stale_index_is_named(tmp_path: Path) -> None:
    models.save(models.llama("tied_grouped"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, tmp_path / "old.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="would not be read, because"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    models.save(models.llama("tied_grouped"), tmp_path, "60KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    tensors = load_file(first) | load_file(second)
    save_file(tensors, second)
    with pytest.raises(CheckpointError, match="is in another file too"):
        open_checkpoint(tmp_path)
