"""Both readers give a model's tensors back exactly, and refuse what they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_kd.checkpoints import CheckpointError, open_checkpoint, parse_layers
from nemo_kd.checkpoints.config_json import read_model
from nemo_kd.checkpoints.families import by_query_group, from_query_groups, shapes_of
from nemo_kd.checkpoints.huggingface import to_transformers
from nemo_kd.checkpoints.nemo_file import model_config
from tests.checkpoints import models


@pytest.mark.parametrize("name", sorted(models.MODELS))
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_a_directory_gives_back_every_tensor(tmp_path: Path, name: str, shard_size: str) -> None:
    model = models.llama(name)
    checkpoint = open_checkpoint(models.save(model, tmp_path, shard_size))
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shard_size == "5GB")
    for key in shapes_of(checkpoint.model):
        assert torch.equal(checkpoint.tensor(key), model.state_dict()[key]), key


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_a_gguf_gives_back_every_tensor(tmp_path: Path, name: str) -> None:
    """The reader undoes llama.cpp's order of the rows of q and k."""
    model = models.llama(name)
    checkpoint = open_checkpoint(models.write_gguf(model, tmp_path / "model.gguf"))
    for key in shapes_of(checkpoint.model):
        assert torch.equal(checkpoint.tensor(key), model.state_dict()[key]), key


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_transformers_gets_the_model_back(tmp_path: Path, name: str) -> None:
    model = models.llama(name)
    checkpoint = open_checkpoint(models.save(model, tmp_path))
    ids = models.tokenizer()(models.TEXT[:300], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(to_transformers(checkpoint)(ids).logits, model(ids).logits)


def test_neutral_settings_of_a_gguf_are_read(tmp_path: Path) -> None:
    """What converters write, old ones too, for a model that has nothing special."""
    model = models.llama("tied_grouped")
    plain = open_checkpoint(models.write_gguf(model, tmp_path / "plain.gguf")).model
    size, config = plain.head_dim, {"vocab_size": models.TOKENS, "expert_used_count": 0}
    keys: dict[str, object] = {
        **{f"llama.{key}": value for key, value in config.items()},
        "llama.attention.key_length": size,
        "llama.attention.value_length": size,
        "llama.attention.causal": 1,
        "llama.attention.sliding_window": 0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scale_linear": 1.0,
        "llama.logit_scale": 0.0,
        "llama.tensor_data_layout": "Meta AI original pth",
        "llama.use_parallel_residual": 0,
    }
    assert open_checkpoint(models.write_gguf(model, tmp_path / "m.gguf", **keys)).model == plain


def test_a_gguf_and_a_directory_of_one_model_are_the_same_model(tmp_path: Path) -> None:
    model = models.llama("tied_grouped")
    directory = open_checkpoint(models.save(model, tmp_path / "hf"))
    file = open_checkpoint(models.write_gguf(model, tmp_path / "model.gguf"))
    assert directory.model == file.model


def test_a_gguf_tokenizer_gives_the_ids_of_the_original(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = open_checkpoint(models.write_gguf(models.llama("tied_grouped"), tmp_path / "m.gguf"))
    assert file.save_tokenizer(str(tmp_path / "tokenizer")).ids == models.TOKENS + 1
    rebuilt = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    text = models.TEXT + "</s> naïve – ½ 中文 😀\r\n\t 1234"
    assert rebuilt(text).input_ids == models.tokenizer()(text).input_ids
    assert rebuilt.decode(rebuilt(text).input_ids) == text
    assert (rebuilt.bos_token_id, rebuilt.eos_token_id, rebuilt.pad_token_id) == (0, 1, 1)


def test_qkv_rows_stand_by_query_group() -> None:
    """Row r of group g: its queries' heads, then its key, then its value."""
    groups, heads, dim, hidden = 2, 6, 3, 5
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": dim}
    model = read_model({"rms_norm_eps": 1e-5, **CONFIG, **sizes})
    q = torch.arange(heads * dim)[:, None].expand(-1, hidden)
    k = torch.arange(100, 100 + groups * dim)[:, None].expand(-1, hidden)
    v = torch.arange(200, 200 + groups * dim)[:, None].expand(-1, hidden)
    joined = by_query_group([q, k, v], model)
    rows = joined[:, 0].tolist()
    first = [*range(9), 100, 101, 102, 200, 201, 202]
    second = [*range(9, 18), 103, 104, 105, 203, 204, 205]
    assert rows == first + second
    for part, given in zip(from_query_groups(joined, model), (q, k, v), strict=True):
        assert torch.equal(part, given)


CONFIG = {**models.SHARED, **models.MODELS["untied_llama3"], "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
    ],
)
def test_a_model_that_would_change_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model({"rms_norm_eps": 1e-5, **CONFIG, **change})


def test_llama3_scaling_reaches_nemos_configuration() -> None:
    config = model_config(read_model({"rms_norm_eps": 1e-5, **CONFIG}))
    keys = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
    assert [config[key] for key in keys] == [4.0, 1.0, 4.0, 32]
    assert config["scale_positional_embedding"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "has RoPE scaling factors"),
        ({"llama.rope.scale_linear": 4.0}, "llama.rope.scale_linear=4.0, which the conversion of"),
        ({"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor=4.0"),
        ({"llama.logit_scale": 0.5, "llama.of_2031": 3}, r"logit_scale=0\.5, llama\.of_2031=3, w"),
        ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv=8.0"),
        ({"llama.attention.causal": 0}, "llama.attention.causal=0"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale=0.5"),
        ({"llama.attention.sliding_window": 16}, "llama.attention.sliding_window=16"),
        ({"llama.tensor_data_layout": "jploski"}, "llama.tensor_data_layout='jploski'"),
        (
            {"llama.rope.dimension_count": 6, "llama.attention.key_length": 12},
            "dimension_count=6, llama.attention.key_length=12: heads that are not rotated whole",
        ),
        ({"llama.block_count": 5}, "lacks 9 of 47 tensors.*first: model.layers.4"),
        (
            {"llama.block_count": 3},
            "has 9 tensors that a Llama.*first: model.layers.3",
        ),
        ({"llama.feed_forward_length": 81}, "shape \\(80, 48\\), but the configuration requires"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm"),
    ],
)
def test_a_gguf_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = models.write_gguf(models.llama("tied_grouped"), tmp_path / "model.gguf", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "only byte-level BPE"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "supported are gpt-2, smollm"),
        ({"tokenizer.ggml.eos_token_id": None}, "no end-of-sequence id"),
    ],
)
def test_a_gguf_tokenizer_that_would_change_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = models.write_gguf(models.llama("tied_grouped"), tmp_path / "model.gguf", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path).save_tokenizer(str(tmp_path / "tokenizer"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    models.save(models.llama("tied_grouped"), tmp_path, shard_size="60KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"1 are missing .first: {lost.name}"):
        open_checkpoint(tmp_path)


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-5, **CONFIG}))
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["nothing", "nothing.gguf"])
def test_a_path_that_is_not_there_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nothing"):
        open_checkpoint(tmp_path / path)


def test_a_broken_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        open_checkpoint(path)


def test_layer_lists() -> None:
    assert parse_layers(None, 3) == (0, 1, 2)
    assert parse_layers("0, 2-4,7", 8) == (0, 2, 3, 4, 7)


@pytest.mark.parametrize("text", ["", "1,0", "2,2", "0-8", "a", "1-", "-1", "3-2"])
def test_a_wrong_layer_list_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="keep-layers"):
        parse_layers(text, 8)
