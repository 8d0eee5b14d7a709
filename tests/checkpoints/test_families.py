"""Every family's settings and tensors, against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from nemo_kd.checkpoints import CheckpointError, open_checkpoint, write_nemo
from nemo_kd.checkpoints.config_json import read_model
from nemo_kd.checkpoints.distributed import DistributedCheckpoint, files_of
from nemo_kd.checkpoints.families import FAMILIES, global_parts, layer_parts
from nemo_kd.checkpoints.huggingface import to_transformers
from nemo_kd.checkpoints.nemo_file import model_config
from nemo_kd.checkpoints.settings import to_version_4
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
        (of("LlamaForCausalLM", is_causal=False), "is_causal is False"),
        (of("LlamaForCausalLM", use_rope=False), "use_rope is False"),
        (of("LlamaForCausalLM", model_type="mistral"), "model_type is 'mistral'"),
        ({**CONFIG, "architectures": 3}, "architectures is 3"),
        (
            of("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=9),
            "num_experts_per_tok is 9, but there are 4 experts",
        ),
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


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("family", "kinds", "found"),
    [
        ("Mistral", [SLIDING] * 4, (32, None)),
        ("Mistral", [FULL, SLIDING, FULL, SLIDING], (None, 32)),
        ("Mistral", [FULL] * 4, (None, 32)),  # transformers gives all layers the window
        ("Qwen3", [FULL, FULL, FULL, SLIDING], (None, 32)),
        ("Qwen3", [FULL] * 4, (None, None)),
    ],
)
def test_layers_of_different_kinds_are_a_limit(
    family: str, kinds: list[str], found: tuple[int | None, int | None]
) -> None:
    config = of(f"{family}ForCausalLM", max_position_embeddings=128, sliding_window=32)
    model = read_model({**config, "layer_types": kinds})
    assert (model.window, model.max_tokens) == found


@pytest.mark.parametrize("family", ["Mistral", "Qwen3", "Llama"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["chunked_attention"] * 4}, "has chunked_attention; converted are full_a"),
        ({"layer_types": ["linear_attention"] * 3 + [FULL]}, "layer_types has linear_attention; c"),
        ({"layer_types": [FULL] * 3}, "has 3 layers, but num_hidden_layers is 4"),
        ({"layer_types": [SLIDING] * 4, "sliding_window": None}, "but sliding_window is null"),
    ],
)
def test_other_kinds_of_layers_are_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    config = of(f"{family}ForCausalLM", max_position_embeddings=128, sliding_window=32)
    with pytest.raises(CheckpointError, match=message):
        read_model({**config, **changes})


def test_neutral_settings_of_known_files_are_read() -> None:
    """Of SmolLM 2 and Phi-4-mini; another value is refused."""
    smol = {"is_llama_config": True, "rope_interleaved": False}
    phi = {"full_attn_mod": 1, "interpolate_factor": 1}
    assert read_model({**CONFIG, **smol}) == read_model(CONFIG)
    config = of("Phi3ForCausalLM", sliding_window=None)
    assert read_model({**config, **phi}) == read_model(config)
    for key, value in {"rope_interleaved": True, "full_attn_mod": 2, "is_llama_config": 0}.items():
        with pytest.raises(CheckpointError, match=f"{key} is {value}, a setting that the"):
            read_model({**CONFIG, key: value})


def test_an_activation_given_twice_is_read_once() -> None:
    """As in the files of Gemma 2; two values are left for the reader to refuse."""
    both = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    holds = "hidden_activation".__eq__
    assert to_version_4(both, holds) == {"hidden_activation": "gelu_pytorch_tanh"}
    assert to_version_4({**both, "hidden_act": "gelu"}, holds)["hidden_act"] == "gelu"
    assert to_version_4({"hidden_act": "silu"}, "hidden_act".__eq__) == {"hidden_act": "silu"}


def test_all_unknown_settings_of_rope_are_named_at_once() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "truncate": False, "alpha": 100.0}
    with pytest.raises(CheckpointError, match=r"RoPE's settings truncate=False, alpha=100\.0 "):
        read_model({**CONFIG, "rope_scaling": scaling})


def test_all_unknown_settings_are_named_at_once() -> None:
    message = (
        r"a_scale is 2\.0, rope_interleaved is True, settings that the .*remove those that do not"
    )
    with pytest.raises(CheckpointError, match=message):
        read_model({**CONFIG, "a_scale": 2.0, "rope_interleaved": True, "unsloth_version": "1"})


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


@pytest.mark.parametrize("own", ["norm", "router", "rest"])
def test_each_tensor_keeps_its_type(tmp_path: Path, own: str) -> None:
    models.save(models.family("mixtral").bfloat16(), tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    wide = {
        key: value.float() if (own in key or "gate.weight" in key) == (own != "rest") else value
        for key, value in load_file(file).items()
    }
    save_file(wide, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "hf")
    done = write_nemo(checkpoint, tmp_path / "a.nemo", [0, 1])
    written = DistributedCheckpoint("a", files_of(done.path, "model_weights"))
    norm = "norm.weight"
    assert written.dtype("model.decoder.final_layernorm.weight") is wide[f"model.{norm}"].dtype
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    router = written.read("model.decoder.layers.mlp.router.weight", (1,))
    assert router.dtype is wide[gate].dtype and torch.equal(router, wide[gate])


def test_a_head_that_is_not_the_tied_embedding_is_named(tmp_path: Path) -> None:
    models.save(models.llama("tied_grouped"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight"):
        open_checkpoint(tmp_path)


def test_an_adapter_beside_the_model_is_named(tmp_path: Path) -> None:
    models.save(models.llama("tied_grouped"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="transformers would load its adapter"):
        open_checkpoint(tmp_path)


def test_a_tokenizer_of_transformers_5_is_read(tmp_path: Path) -> None:
    models.save(models.llama("tied_grouped"), tmp_path / "hf")
    file = tmp_path / "hf/tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<s>"]}
    file.write_text(json.dumps(config | {"backend": "tokenizers", "is_local": True}))
    size = open_checkpoint(tmp_path / "hf").save_tokenizer(str(tmp_path / "saved"))
    assert size.ids == models.TOKENS
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved(models.TEXT).input_ids == models.tokenizer()(models.TEXT).input_ids
    assert saved.additional_special_tokens == ["<s>"] and saved.eos_token == "</s>"
