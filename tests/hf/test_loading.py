"""Checkpoints that transformers would load as something else than they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_kd.errors import NemoKDError
from nemo_kd.hf.loading import from_directory
from tests.hf.test_settings import LLAMA, model, rewrite


def tensors(path: Path, **changes: Any) -> None:
    """Add tensors to the file, under names with `_` for `.`."""
    file = path / "model.safetensors"
    held = load_file(file)
    held |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file(held, file, metadata={"format": "pt"})


def adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "elsewhere", "peft_type": "LORA"})
    )


def second(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapter, "merge the adapter"),
        (second, "would not be read"),
        (lambda path: tensors(path, lm_head__weight=torch.ones(61, 32)), "config.json ties them"),
        (
            lambda path: tensors(path, model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
            "1 tensors that llama does not use, such as model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda path: rewrite(path, num_hidden_layers=3),
            "9 tensors that llama does not use, such as model.layers.3.input_layernorm.weight",
        ),
        (
            lambda path: rewrite(
                path, architectures=["OtherForCausalLM"], auto_map={"AutoModelForCausalLM": "o.O"}
            ),
            "names the architecture OtherForCausalLM",
        ),
        (
            lambda path: rewrite(path, quantization_config={"quant_method": "gptq", "bits": 4}),
            "transformers does not load",
        ),
        (lambda path: rewrite(path, is_encoder_decoder=True), "sequence-to-sequence"),
    ],
)
def test_another_model_than_the_directory_says_is_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    model("Llama", {**LLAMA, "tie_word_embeddings": True}).save_pretrained(tmp_path)
    from_directory(tmp_path, torch.float32)
    change(tmp_path)
    with pytest.raises(NemoKDError, match=message):
        from_directory(tmp_path, torch.float32)


def test_a_decoder_of_a_translator_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 61}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = transformers.BartConfig(**sizes, **heads, decoder_ffn_dim=32)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(NemoKDError, match="sequence-to-sequence"):
        from_directory(tmp_path, torch.float32)


@torch.no_grad()
def test_the_same_embedding_twice_and_old_buffers_change_nothing(tmp_path: Path) -> None:
    original = model("Llama", {**LLAMA, "tie_word_embeddings": True})
    original.save_pretrained(tmp_path)
    tensors(
        tmp_path,
        lm_head__weight=original.lm_head.weight.clone(),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
    )
    ids = torch.arange(9)[None]
    assert torch.equal(from_directory(tmp_path, torch.float32)(ids).logits, original(ids).logits)
