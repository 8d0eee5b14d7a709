"""Read a Hugging Face directory; build a transformers model of any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from nemo_kd.checkpoints.llama import (
    Checkpoint,
    CheckpointError,
    Llama,
    RopeScaling,
    check_tensors,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ARCHITECTURE = "LlamaForCausalLM"


class HuggingFaceCheckpoint:
    """A directory that `save_pretrained` wrote, sharded or not; tensors are memory-mapped."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.name = str(self.directory)
        config = _config(self.directory)
        self.llama = read_llama(config)
        self._files: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(self.directory):
            file: Any = safe_open(str(path), framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                self._files[key] = file
                shapes[key] = tuple(file.get_slice(key).get_shape())
        check_tensors(self.name, self.llama, shapes)
        self.dtype = self.tensor("model.norm.weight").dtype

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of this name, `[out, in]`."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def save_tokenizer(self, directory: str) -> int:
        """Load the tokenizer with transformers and save it; return its vocabulary size."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(self.directory), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.name} has no tokenizer that transformers can load ({error}); "
                "put tokenizer.json and tokenizer_config.json beside config.json"
            ) from error
        tokenizer.save_pretrained(directory)
        return len(tokenizer)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"no config.json in {directory}; expected a Hugging Face checkpoint directory "
            "(config.json and *.safetensors) or a .gguf file"
        )
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{index} lists {len(names)} files, of which {len(absent)} are missing (first: "
                f"{absent[0]}); download them"
            )
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"no *.safetensors in {directory}; pickled weights (*.bin) are not read: save them "
            "again with transformers' save_pretrained(..., safe_serialization=True)"
        )
    return files


def read_llama(config: Mapping[str, Any]) -> Llama:
    """Parse a `config.json`.

    Errors: CheckpointError for a setting that Megatron's Llama does not support.
    """
    found = config.get("architectures") or [config.get("model_type")]
    _expect("architectures", found, [ARCHITECTURE])
    _expect("hidden_act", config.get("hidden_act", "silu"), "silu")
    for key in ("attention_bias", "mlp_bias"):
        _expect(key, config.get(key, False), False)
    _expect("quantization_config", config.get("quantization_config"), None)
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    return Llama(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        context=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_base=float(config.get("rope_theta") or (rope or {}).get("rope_theta", 10000.0)),
        rope_scaling=read_rope_scaling(rope),
        tied=config.get("tie_word_embeddings", False),
    )


def read_rope_scaling(rope: Mapping[str, Any] | None) -> RopeScaling | None:
    """Llama 3.1's scaling, the only kind that NeMo supports; None without scaling.

    Errors: CheckpointError for another kind.
    """
    kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
    if rope is None or kind == "default":
        return None
    _expect("rope_scaling.rope_type", kind, "llama3")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )


def to_transformers(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """Load the checkpoint as a float32 transformers model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = checkpoint.llama
    config = LlamaConfig(
        vocab_size=llama.vocab_size,
        hidden_size=llama.hidden_size,
        intermediate_size=llama.ffn_hidden_size,
        num_hidden_layers=llama.num_layers,
        num_attention_heads=llama.num_heads,
        num_key_value_heads=llama.num_kv_heads,
        head_dim=llama.head_dim,
        max_position_embeddings=llama.context,
        rms_norm_eps=llama.norm_eps,
        rope_theta=llama.rope_base,
        rope_scaling=_rope_scaling_config(llama.rope_scaling),
        tie_word_embeddings=llama.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: checkpoint.tensor(name).float() for name in llama.shapes()}
    if llama.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # The only buffer; it is not in the state and was created on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def _rope_scaling_config(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = asdict(scaling)
    context = values.pop("original_context")
    return {"rope_type": "llama3", **values, "original_max_position_embeddings": context}


def _expect(key: str, actual: Any, expected: Any) -> None:
    if actual != expected:
        raise CheckpointError(
            f"config.json: {key} is {actual!r}; only {expected!r} can be converted"
        )
