"""Settings from Megatron-Bridge's run_config.yaml, and from megatron-core 0.19's sharded object."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_kd.checkpoints.arguments import read_arguments
from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.checkpoints.source import open_source
from tests.processes import run_program

GPT = "megatron.bridge.models.gpt_provider"
MODEL = {
    "_target_": f"{GPT}.GPTModelProvider",
    "transformer_layer_spec": {"_target_": f"{GPT}.default_layer_spec", "_call_": False},
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "attention_backend": {"_target_": "megatron.core.transformer.enums.AttnBackend"},
    "share_embeddings_and_output_weights": False,
    "vocab_size": 300,
    "cuda_graph_impl": "none",
    "rope_scaling": False,
    "softmax_type": "vanilla",
}
SAME = (
    *("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_query_groups"),
    *("kv_channels", "normalization", "add_qkv_bias", "qk_layernorm", "moe_ffn_hidden_size"),
    *("moe_router_topk", "position_embedding_type", "rotary_base", "add_bias_linear"),
)
OTHERS = {
    "num_moe_experts": "num_experts",
    "gated_linear_unit": "swiglu",
    "layernorm_epsilon": "norm_epsilon",
    "seq_length": "max_position_embeddings",
}
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "gemma2_provider.Gemma2ModelProvider, which may": {
        "_target_": "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider"
    },
    "export it to Hugging Face's format": {"_target_": "own.GPTModelProvider"},
    "of layers of own.default_layer_spec": {
        "transformer_layer_spec": {"_target_": "own.default_layer_spec", "_call_": False}
    },
    "'_args_': [4]": {
        "transformer_layer_spec": {"_target_": f"{GPT}.default_layer_spec", "_args_": [4]}
    },
    "activation_func own.silu": {"activation_func": {"_target_": "own.silu", "_call_": False}},
    "lacks Megatron-LM's arguments num_layers": {"num_layers": None},
    "multi_latent_attention=True is not supported": {"multi_latent_attention": True},
}


def bridges(model: dict[str, Any], checkpoint: Path, tokenizer: Path, directory: Path) -> Path:
    """A checkpoint of Megatron-LM with run_config.yaml and a tokenizer in place of arguments."""
    shutil.copytree(checkpoint, directory)
    step = directory / "iter_0000010"
    (step / "common.pt").unlink()
    settings = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "gone"}
    config = yaml.safe_dump({"model": model, "tokenizer": settings})
    (step / "run_config.yaml").write_text(config)
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tokenizer, step / "tokenizer", ignore=weights)
    return directory


def test_settings_of_bridge_and_of_a_sharded_object_are_those_of_megatron_lm(
    teachers: Path, megatron_lm: Path, tmp_path: Path
) -> None:
    """And other models of Bridge are refused. The child process has Megatron for a CPU."""
    source, tokenizer = megatron_lm / "mixtral", teachers / "mixtral"
    args = read_arguments(open_source(source))
    model = {**MODEL, **{name: args.get(name) for name in SAME}}
    model |= {name: args[old] for name, old in OTHERS.items()}
    for number, changes in enumerate(CHANGES.values()):
        bridges({**model, **changes}, source, tokenizer, tmp_path / str(number))
    program, sharded = "tests/mcore/megatron_lm.py", tmp_path / "sharded"
    run_program(program, sharded, tokenizer, "sharded=true", fork=True)
    assert not (sharded / "iter_0000010/common.pt").exists()
    opened = [tmp_path / str(number) for number in range(len(CHANGES))]
    done = run_program("tests/mcore/settings.py", tokenizer, source, sharded, *opened, fork=True)
    theirs, ours, bridge, *errors = done.stdout.splitlines()[-len(CHANGES) - 2 :]
    assert "num_moe_experts" in theirs and ours == theirs
    assert bridge == theirs
    for error, message in zip(errors, list(CHANGES)[1:], strict=True):
        assert message in error


def test_a_run_config_that_is_no_configuration_is_refused(
    teachers: Path, megatron_lm: Path, tmp_path: Path
) -> None:
    from nemo_kd.checkpoints.run_config import read_run_config

    made = bridges({}, megatron_lm / "mixtral", teachers / "mixtral", tmp_path / "run")
    path = made / "iter_0000010/run_config.yaml"
    for text in ("model: !!python/object/apply:os.getcwd []", "- 1", "model: {", "model: {}"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"run_config\.yaml"):
            read_run_config(open_source(made))
