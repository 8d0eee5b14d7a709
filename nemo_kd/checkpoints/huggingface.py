"""Read a Hugging Face directory; build a transformers model of any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import safe_open

from nemo_kd.checkpoints.llama import (
    Checkpoint,
    CheckpointError,
    Layers,
    Llama,
    Positive,
    RopeScaling,
    Size,
    check_tensors,
    checked,
    finite,
    reading,
)
from nemo_kd.files import decode_json, read_bounded
from nemo_kd.vocabulary import VocabularySize

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ARCHITECTURE = "LlamaForCausalLM"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights, by safetensors' names."""
MAX_CONFIG, MAX_INDEX = 4 << 20, 64 << 20  # bytes of config.json and of the index


class _Sizes(msgspec.Struct):
    """The keys of `config.json` that give sizes and constants."""

    num_hidden_layers: Layers
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: Positive
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rope_theta: Positive | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None


class HuggingFaceCheckpoint:
    """A directory that `save_pretrained` wrote, sharded or not; tensors are memory-mapped."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.name = str(self.directory)
        path = self.directory / "config.json"
        with reading(str(path)):
            self.llama = read_llama(_config(path))
        self._files: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(self.directory):
            with reading(str(path)):
                file: Any = safe_open(str(path), framework="pt")
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    self._files[key] = file
                    shapes[key] = _shape(path, key, file.get_slice(key))
        check_tensors(self.name, self.llama, shapes)
        self.dtype = self.tensor("model.norm.weight").dtype

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of this name, `[out, in]`."""
        with reading(f"{self.name}: {name}"):
            return finite(self.name, name, self._files[name].get_tensor(name))

    def save_tokenizer(self, directory: str) -> VocabularySize:
        """Load the tokenizer with transformers and save it; return its vocabulary's size."""
        from transformers import AutoTokenizer

        with reading(
            self.name,
            "no tokenizer that transformers can load; put tokenizer.json and "
            "tokenizer_config.json beside config.json",
        ):
            tokenizer = AutoTokenizer.from_pretrained(
                str(self.directory), local_files_only=True, trust_remote_code=False
            )
            tokenizer.save_pretrained(directory)
            return VocabularySize.of(tokenizer)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"no config.json in {path.parent}; expected a Hugging Face checkpoint directory "
            "(config.json and *.safetensors) or a .gguf file"
        )
    config: dict[str, Any] = decode_json(read_bounded(path, MAX_CONFIG), dict[str, Any])
    return config


def _shape(path: Path, key: str, part: Any) -> tuple[int, ...]:
    """Return a tensor's shape; raise CheckpointError unless its values are floats."""
    if part.get_dtype() not in FLOATS:
        raise CheckpointError(
            f"{path}: {key} is {part.get_dtype()}; weights must be one of {', '.join(FLOATS)}"
        )
    return tuple(part.get_shape())


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _indexed(index: Path) -> list[str]:
    """Return the files of an index; raise CheckpointError if one lies elsewhere."""
    with reading(str(index)):
        found = decode_json(read_bounded(index, MAX_INDEX), _Index)
        names = sorted(set(found.weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{index} names {name!r}; files must lie beside it, without a directory"
            )
    return names


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = _indexed(index)
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{index} lists {len(names)} files, of which {len(absent)} are missing (first: "
                f"{absent[0]}); download them"
            )
        return [directory / name for name in names]
    files = [path for path in sorted(directory.glob("*.safetensors")) if path.is_file()]
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
    sizes = checked("config.json", config, _Sizes)
    heads = sizes.num_attention_heads
    rope = sizes.rope_parameters or sizes.rope_scaling
    scaling = read_rope_scaling(rope)
    return Llama.of(
        "config.json",
        num_layers=sizes.num_hidden_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.intermediate_size,
        num_heads=heads,
        num_kv_heads=sizes.num_key_value_heads or heads,
        head_dim=sizes.head_dim or sizes.hidden_size // heads,
        vocab_size=sizes.vocab_size,
        context=sizes.max_position_embeddings,
        norm_eps=sizes.rms_norm_eps,
        rope_base=float(sizes.rope_theta or (rope or {}).get("rope_theta", 10000.0)),
        rope_scaling=None if scaling is None else asdict(scaling),
        tied=bool(sizes.tie_word_embeddings),
    )


def read_rope_scaling(rope: Mapping[str, Any] | None) -> RopeScaling | None:
    """Llama 3.1's scaling, the only kind that NeMo supports; None without scaling.

    Errors: CheckpointError for another kind.
    """
    kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
    if rope is None or kind == "default":
        return None
    _expect("rope_scaling.rope_type", kind, "llama3")
    values = {**rope, "original_context": rope.get("original_max_position_embeddings")}
    return checked("config.json: rope_scaling", values, RopeScaling)


def to_transformers(
    checkpoint: Checkpoint, keep_layers: Sequence[int] | None = None
) -> LlamaForCausalLM:
    """Load the checkpoint, or some of its layers, as a float32 transformers model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kept = range(checkpoint.llama.num_layers) if keep_layers is None else keep_layers
    llama = replace(checkpoint.llama, num_layers=len(kept))
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
    state = {name: checkpoint.tensor(_source(name, kept)).float() for name in llama.shapes()}
    if llama.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # The only buffer; it is not in the state and was created on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def _source(name: str, kept: Sequence[int]) -> str:
    """Return a tensor's name in the checkpoint of which the layers `kept` are kept."""
    prefix, layers, rest = name.partition("model.layers.")
    if not layers:
        return name
    layer, _, rest = rest.partition(".")
    return f"{prefix}{layers}{kept[int(layer)]}.{rest}"


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
