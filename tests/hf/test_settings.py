"""Settings of `config.json`: translated from transformers 5, or refused if nothing reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nemo_kd.checkpoints.settings import to_version_4
from nemo_kd.errors import NemoKDError
from nemo_kd.hf.loading import from_directory
from nemo_kd.hf.settings import ConfigError, read_config
from nemo_kd.hf.student import load_student
from tests.checkpoints import models

LLAMA = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    **{"max_position_embeddings": 128, "initializer_range": 0.3},
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
NEOX = {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "head_dim")}
FALCON = {key: NEOX[key] for key in NEOX if key != "intermediate_size"}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
# Family, its settings in transformers 4, and what transformers 5.0 writes for them.
TRANSLATED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("Llama", {**LLAMA, "rope_theta": 5e5}, {"rope_parameters": DEFAULT}),
    "llama3": (
        "Llama",
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ),
    "yarn": (
        "Qwen2",
        {**LLAMA, "rope_theta": 5e4, "rope_scaling": YARN},
        {"rope_parameters": {**YARN, "rope_theta": 5e4}},
    ),
    "yarn of another length": (
        "Qwen2",
        {**LLAMA, "rope_theta": 5e4, "rope_scaling": YARN},
        {"rope_parameters": {**YARN, "rope_theta": 5e4}, "max_position_embeddings": 64},
    ),
    "longrope": (
        "Phi3",
        {
            **{**LLAMA, "rope_theta": 3e4, "original_max_position_embeddings": 16},
            "rope_scaling": {"type": "longrope", **LONG},
        },
        {
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 3e4, "partial_rotary_factor": 1.0},
                **{**LONG, "original_max_position_embeddings": 16},
            }
        },
    ),
    "by layer type": (
        "Gemma3Text",
        {
            **{**LLAMA, "num_hidden_layers": 7, "sliding_window": 8, "rope_theta": 3e4},
            **{"rope_local_base_freq": 2e4, "rope_scaling": LINEAR, "sliding_window_pattern": 3},
        },
        {
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 3e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
            "_sliding_window_pattern": 3,
            "layer_types": [
                "full_attention" if layer in (2, 5) else "sliding_attention" for layer in range(7)
            ],
        },
    ),
    "fraction": (
        "GPTNeoX",
        {**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 5e5},
        {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
    ),
}
OF_VERSION_4 = (
    *("torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_pct"),
    *("rotary_emb_base", "sliding_window_pattern", "partial_rotary_factor"),
)
IDS = torch.randint(1, 61, (2, 40), generator=torch.Generator().manual_seed(0))


def model(family: str, settings: dict[str, Any], attention: str | None = None) -> Any:
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**settings)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return made.eval()


def rewrite(directory: Path, without: tuple[str, ...] = (), **settings: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if key not in without}
    path.write_text(json.dumps(kept | settings))


@pytest.mark.parametrize("name", TRANSLATED)
@torch.no_grad()
def test_a_file_of_transformers_5_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    family, settings, written = TRANSLATED[name]
    original = model(family, settings)
    expected = original(IDS).logits
    original.save_pretrained(tmp_path)
    rewrite(tmp_path, OF_VERSION_4, dtype="float32", transformers_version="5.0.0", **written)
    assert torch.equal(from_directory(tmp_path, torch.float32).eval()(IDS).logits, expected)
    other = model(family, {**settings, "rope_theta": 1e4, "rotary_emb_base": 1e4})
    other.load_state_dict(original.state_dict())
    assert (other(IDS).logits - expected).abs().max() > 0.01  # the base shows


@pytest.mark.parametrize(
    ("family", "settings", "change", "message"),
    [
        ("Llama", LLAMA, {"attention_scale": 3}, "attention_scale=3 is not a setting of LlamaCo"),
        (
            "Llama",
            LLAMA,
            {"attention_scale": 3, "sinks": 2},
            "attention_scale=3, sinks=2 are not settings of LlamaConfig",
        ),
        ("Llama", LLAMA, {"rope_parameters": {**YARN, "truncate": False}}, "truncate=False"),
        (
            "Llama",
            LLAMA,
            {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": LINEAR}},
            "rope_parameters has different settings for full_attention, sliding_attention",
        ),
        ("Gemma2", LLAMA, {"layer_types": ["full_attention"] * 4}, "layer_types="),
        ("Llama", LLAMA, {"rope_scaling": {**YARN, "factor": 4.0}}, "set max_position_embeddings"),
        ("Llama", LLAMA, {"text_config": {"hidden_size": 7}}, "text_config="),
        (
            "Qwen2",
            LLAMA,
            {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
            "max_window_layers=2 gives a sliding window to some of the 4 layers",
        ),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(
    family: str, settings: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    getattr(transformers, f"{family}Config")(**settings).save_pretrained(tmp_path)
    read_config(tmp_path)
    rewrite(tmp_path, **change, transformers_version="5.0.0")
    with pytest.raises(ConfigError, match=f"{message}.*install transformers 5.0.0, which wrote"):
        read_config(tmp_path)


def test_the_own_files_of_every_family_are_read_as_they_are(tmp_path: Path) -> None:
    seen = 0
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]()
            config.save_pretrained(tmp_path / name)
        except (ValueError, AttributeError):
            continue  # it has no default
        expected = json.loads((tmp_path / name / "config.json").read_text())
        for part in (expected, expected.get("text_config", {})):
            if not part.get("use_sliding_window", True):
                part["sliding_window"] = None  # it has none, which the model would overlook
        read_config(tmp_path / name).save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again/config.json").read_text()) == expected, name
        seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Gemma2", {**LLAMA, "attn_logit_softcapping": 1.0, "sliding_window": 8}),
        ("GPT2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
        ("GPT2", {**GPT2, "scale_attn_weights": False}),
        ("Falcon", {**FALCON, "alibi": True}),
    ],
)
@torch.no_grad()
def test_attention_computes_with_every_setting(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    eager = model(family, settings, "eager")
    eager.save_pretrained(tmp_path)
    expected = eager(IDS).logits
    assert torch.equal(from_directory(tmp_path, torch.float32).eval()(IDS).logits, expected)
    default = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (default(IDS).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_window_that_is_off_masks_nothing(tmp_path: Path) -> None:
    off = {"use_sliding_window": False, "sliding_window": 8}
    original = model("Qwen2", {**LLAMA, **off})
    original.save_pretrained(tmp_path)
    rest = model("Qwen2", {**LLAMA, "sliding_window": None})
    rest.load_state_dict(original.state_dict())
    loaded = from_directory(tmp_path, torch.float32).eval()
    assert torch.equal(loaded(IDS).logits, rest(IDS).logits)


@torch.no_grad()
def test_a_pruned_student_has_no_window_that_is_off_and_the_ends_of_the_whole(
    tmp_path: Path,
) -> None:
    off = {"use_sliding_window": False, "sliding_window": 8, "num_hidden_layers": 3}
    model("Qwen2", {**LLAMA, **off, "vocab_size": 300}).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    ends = {"eos_token_id": [1, 5], "temperature": 0.6, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    whole, _ = load_student(tmp_path)
    pruned, _ = load_student(tmp_path, "0-2")
    assert (pruned.eval()(IDS).logits - whole.eval()(IDS).logits).abs().max() < 1e-5
    assert pruned.generation_config.to_dict() == whole.generation_config.to_dict()
    assert pruned.generation_config.eos_token_id == [1, 5]


def test_the_empty_settings_beside_those_of_layer_types_are_passed_over() -> None:
    """As transformers 5.0 writes them for Gemma 3."""
    full = {"rope_type": "default", "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e4}
    both = {"full_attention": full, "sliding_attention": local}
    for more in ({}, {"rope_theta": None, "rope_type": "default"}):
        found = to_version_4(
            {"rope_parameters": {**both, **more}}, lambda key: key != "rope_parameters"
        )
        assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 1e4)


def test_a_base_in_two_places_must_be_one() -> None:
    config = {"rope_theta": 1e4, "rope_parameters": DEFAULT}
    with pytest.raises(NemoKDError, match=r"rope_theta is 10000\.0, but 500000\.0 in"):
        to_version_4(config, lambda key: key != "rope_parameters")
