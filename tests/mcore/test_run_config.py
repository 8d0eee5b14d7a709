"""Llama 3.1's scaling of RoPE in Megatron-Bridge's run_config.yaml, in its versions' two forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_kd.checkpoints.distributed import files_of
from nemo_kd.checkpoints.model import CheckpointError, Rope, RopeScaling
from nemo_kd.checkpoints.run_config import read_run_config
from nemo_kd.checkpoints.source import Source
from nemo_kd.mcore.arguments import settings_of_arguments

BRIDGE = "megatron.bridge.models"
MODEL: dict[str, Any] = {  # as Bridge saves it, objects of a training included
    "_target_": f"{BRIDGE}.llama.llama_provider.Llama31ModelProvider",
    "transformer_layer_spec": {
        "_target_": f"{BRIDGE}.gpt_provider.default_layer_spec",
        "_call_": False,
    },
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "attention_backend": {
        "_target_": "megatron.core.transformer.enums.AttnBackend",
        "_args_": [5],
        "_call_": True,
    },
    "grad_scale_func": {"_target_": "megatron.core.optimizer.optimizer.scale_loss"},
    "init_method": {"_target_": "torch.nn.init.normal_", "_partial_": True, "std": 0.02},
    "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
    "mtp_loss_scaling_factor": 0.1,
    "gated_linear_unit": True,
    "num_layers": 16,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "seq_length": 131072,
}
BEFORE = {  # Bridge 0.1 to 0.3.0
    "scale_factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}


def rope(directory: Path, **changes: Any) -> Rope:
    text = yaml.safe_dump({"model": {**MODEL, **changes}, "tokenizer": {}})
    (directory / "run_config.yaml").write_text(text)
    stored = read_run_config(Source(directory, files_of(directory), None, None))
    assert stored is not None
    return settings_of_arguments("c", stored, {}).rope


def test_both_forms_give_the_scaling_of_llama_3(tmp_path: Path) -> None:
    scaled = Rope(base=500000, llama3=RopeScaling(32.0, 1.0, 4.0, 8192))
    assert rope(tmp_path, **BEFORE) == scaled
    assert rope(tmp_path, **BEFORE, rope_scaling=False, rope_scaling_factor=1.0) == scaled
    assert rope(tmp_path, rope_scaling=True, rope_scaling_factor=32.0) == scaled
    assert rope(tmp_path) == rope(tmp_path, rope_scaling=False) == Rope(base=500000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**BEFORE, "low_freq_factor": 2.0}, r"low_freq_factor=2\.0 beside scale_factor=32\.0"),
        ({**BEFORE, "high_freq_factor": 8.0}, r"high_freq_factor=8\.0 .*only 4;"),
        ({**BEFORE, "old_context_len": 4096}, "old_context_len=4096 .*only 8192;"),
        ({**BEFORE, "rope_scaling": True}, "rope_scaling=True beside scale_factor"),
        ({"high_freq_factor": 4.0}, r"argument high_freq_factor=4\.0 is not supported"),
        ({"logits_scaling": 8.0}, r"argument logits_scaling=8\.0 is not supported"),
        ({"nope_layer_interval": 4}, "nope_layer_interval=4 is not supported"),
        ({"window_size": {"_target_": "own.Window"}}, "window_size=.*own.Window.*not supported"),
        ({"softmax_type": {"_target_": "own.Type"}}, "softmax_type=.*own.Type.*not supported"),
        (
            {"_target_": f"{BRIDGE}.llama.llama_provider.Llama4ModelProvider"},
            "its model is a .*Llama4ModelProvider, which may compute more",
        ),
    ],
)
def test_what_megatron_core_would_compute_in_another_way_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        rope(tmp_path, **changes)
