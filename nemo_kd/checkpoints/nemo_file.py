"""Write a `.nemo`: a tar of NeMo's configuration, the distributed checkpoint and the tokenizer.

It needs no NeMo and builds no model: memory holds one tensor at a time.
"""

from __future__ import annotations

import hashlib
import math
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
import yaml

from nemo_kd.checkpoints import distributed, megatron
from nemo_kd.checkpoints.families import family_of
from nemo_kd.checkpoints.model import (
    Checkpoint,
    CheckpointError,
    Experts,
    Model,
    Rope,
    reading,
)
from nemo_kd.checkpoints.source import CONFIG, CONVERTED
from nemo_kd.checkpoints.tokenizer import (
    ARTIFACT_NAME,
    ARTIFACT_PREFIX,
    pack_tokenizer,
    read_member,
    refuse_foreign_tokenizer,
)
from nemo_kd.checkpoints.verify import Verified, verify
from nemo_kd.files import decode_json, flush
from nemo_kd.outputs import install, refuse_directory, refuse_inputs, work_beside
from nemo_kd.vocabulary import VocabularySize

TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model.MegatronGPTSFTModel"


@dataclass(frozen=True)
class Conversion:
    """A written `.nemo`."""

    path: Path
    tokenizer: Path
    layers: tuple[int, ...]
    """Layers of the source that it contains."""
    parameters: int
    vocab_size: int
    dtype: torch.dtype
    unused_rows: int
    """Embedding rows beyond the tokenizer's vocabulary: kept, but no part of the training."""
    verified: Verified | None


def parse_layers(text: str | None, num_layers: int) -> tuple[int, ...]:
    """`"0,1,8-10"` → (0, 1, 8, 9, 10); `@FILE` → the list `kept` of that JSON file; None → all.

    Errors: CheckpointError for another text, layers that do not ascend or do not exist.
    """
    if text is None:
        return tuple(range(num_layers))
    if text.startswith("@"):
        text = _kept(Path(text.removeprefix("@")))
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise CheckpointError(
                f"keep-layers has {part!r}; expected layer numbers such as 0,1,8-11,29"
            )
        layers += range(int(first), int(last if dash else first) + 1)
    if not layers or layers[-1] >= num_layers or sorted(set(layers)) != layers:
        raise CheckpointError(
            f"keep-layers is {text!r}; expected ascending layer numbers from 0 to {num_layers - 1}"
        )
    return tuple(layers)


class _Kept(msgspec.Struct):
    kept: list[int]


def _kept(path: Path) -> str:
    """Return the list `kept` of a JSON file, such as examples/demo/block_influence.py writes."""
    if not path.is_file():
        raise CheckpointError(f"keep-layers is @{path}, but there is no such file")
    with reading(str(path)):
        return ",".join(map(str, decode_json(path.read_bytes(), _Kept).kept))


def write_nemo(
    checkpoint: Checkpoint,
    output: str | Path,
    keep_layers: Sequence[int],
    dtype: torch.dtype | None = None,
    written: Callable[[int], object] = lambda size: None,
    *,
    compare: bool = False,
) -> Conversion:
    """Write the `keep_layers` of `checkpoint` to `output` (.nemo), and its tokenizer beside it.

    `dtype` None keeps each tensor's own. An existing model and its tokenizer stay until the new
    ones are complete. `written` is called with the bytes of each tensor when it is written. With
    `compare`, the logits are compared with transformers', and another model is a CheckpointError.
    """
    output = Path(output).parent.resolve() / Path(output).name
    tokenizer = output.with_suffix(".tokenizer")
    written_as = dtype or checkpoint.dtype
    refuse_inputs([output, tokenizer], [checkpoint.name])
    refuse_directory(output)
    _refuse_foreign(output)
    refuse_foreign_tokenizer(tokenizer, output)
    with work_beside(output) as work:
        new, folder, archive_path = work / "tokenizer", work / "model", work / "nemo"
        vocabulary = _write_tokenizer(checkpoint, new)
        packed = pack_tokenizer(new)
        artifact = f"{hashlib.sha256(packed).hexdigest()[:32]}_{ARTIFACT_NAME}"
        model = replace(checkpoint.model, num_layers=len(keep_layers))
        config = model_config(model)
        if vocabulary.tokens < vocabulary.ids:  # NeMo would count the tokens
            multiple = config["make_vocab_size_divisible_by"]
            config["override_vocab_size"] = -(-vocabulary.ids // multiple) * multiple
        config["tokenizer"] = {
            "library": "huggingface",
            "type": str(tokenizer),
            "model": ARTIFACT_PREFIX + artifact,
            "vocab_file": None,
            "merge_file": None,
            "use_fast": True,
        }
        config[CONVERTED] = {
            "checkpoint": os.path.abspath(checkpoint.name),
            "layers": list(keep_layers),
            "config": dict(checkpoint.config),
            "generation_config": checkpoint.generation_config,
        }
        distributed.write(
            megatron.slices(checkpoint, keep_layers, dtype),
            megatron.extra_states(checkpoint.model, len(keep_layers)),
            folder / "model_weights",
            written,
        )
        (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        (folder / artifact).write_bytes(packed)
        verified = verify(checkpoint, keep_layers, dtype, folder, new) if compare else None
        with tarfile.open(archive_path, "w:") as archive:
            archive.add(folder, arcname=".")
        _install(archive_path, output, new, tokenizer)
    return Conversion(
        path=output,
        tokenizer=tokenizer,
        layers=tuple(keep_layers),
        parameters=megatron.count_parameters(model, vocabulary.ids),
        vocab_size=vocabulary.ids,
        dtype=written_as,
        unused_rows=checkpoint.model.vocab_size - vocabulary.ids,
        verified=verified,
    )


def _refuse_foreign(output: Path) -> None:
    """Raise CheckpointError if `output` exists and is not a model that a conversion wrote.

    A training keeps `converted_from` in the configuration of its student, and adds its data.
    """
    if not os.path.lexists(output):
        return
    try:
        config = yaml.safe_load(read_member(output, CONFIG))
    except (CheckpointError, OSError, yaml.YAMLError):
        config = None
    ours = isinstance(config, dict) and CONVERTED in config and not config.get("data")
    if not ours:
        raise CheckpointError(
            f"{output} would be replaced, but it is not a model that a conversion wrote; move it "
            "away, or choose another name"
        )


def written_bytes(checkpoint: Checkpoint, num_layers: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights that `write_nemo` writes."""
    kept = range(num_layers)
    return sum(one.nbytes for one in megatron.slices(checkpoint, kept, dtype))


def _install(archive: Path, output: Path, new: Path, tokenizer: Path) -> None:
    """Replace model and tokenizer, without a moment in which a model is beside another's tokenizer.

    In between there is none, and either model would be read with the copy inside it.
    """
    flush(new)
    previous = new.with_name("previous.tokenizer")
    if tokenizer.exists():
        os.rename(tokenizer, previous)
    try:
        install(archive, output)
    except BaseException:
        if previous.exists():
            os.rename(previous, tokenizer)
        raise
    install(new, tokenizer)


def _write_tokenizer(checkpoint: Checkpoint, directory: Path) -> VocabularySize:
    vocabulary = checkpoint.save_tokenizer(str(directory))
    if vocabulary.ids > checkpoint.model.vocab_size:
        raise CheckpointError(
            f"{checkpoint.name}: the tokenizer's largest id is {vocabulary.ids - 1}, but the "
            f"embedding has {checkpoint.model.vocab_size} rows; they belong to different models"
        )
    return vocabulary


def model_config(model: Model) -> dict[str, Any]:
    """NeMo's `model` section for a model in NVIDIA's container.

    Sizes, RoPE, norm and activation describe the model; the rest are NeMo's pre-training defaults,
    which a training configuration overrides.
    """
    family = family_of(model)
    return {
        "target": TARGET,
        "mcore_gpt": True,
        # Only this one of NeMo's layer specifications reads qk_layernorm.
        **({"name": "decoder_block_gpt", "qk_layernorm": True} if family.qk_norm else {}),
        "encoder_seq_length": model.context,
        "max_position_embeddings": model.context,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "normalization": family.norm,
        "layernorm_epsilon": model.norm_eps,
        "activation": "fast-swiglu" if family.gated else "squared-relu",
        "bias": False,
        "qkv_bias": family.qkv_bias,
        **_rope(model.rope),
        **_limits(model),
        **_experts(model.experts),
        "share_embeddings_and_output_weights": model.tied,
        "make_vocab_size_divisible_by": 128,
        "pre_process": True,
        "post_process": True,
        "transformer_block_type": "pre_ln",
        "normalize_attention_scores": True,
        "apply_query_key_layer_scaling": False,
        "attention_softmax_in_fp32": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "init_method_std": 0.02,
        "transformer_engine": True,
        "persist_layer_norm": True,
        "masked_softmax_fusion": True,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "gradient_as_bucket_view": False,
        "use_cpu_initialization": False,
        "megatron_amp_O2": False,
        "precision": "bf16",
        "seed": 1234,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
        "optim": {"name": "fused_adam", "lr": 1e-4},
        "data": {},
        "peft": {"peft_scheme": "none"},
    }


def _rope(rope: Rope) -> dict[str, Any]:
    config: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": rope.base,
        "rotary_percentage": rope.fraction,
        "seq_len_interpolation_factor": rope.interpolation,
    }
    if rope.llama3 is not None:
        config |= {
            "scale_positional_embedding": True,
            "scale_factor": rope.llama3.factor,
            "low_freq_factor": rope.llama3.low_freq_factor,
            "high_freq_factor": rope.llama3.high_freq_factor,
            "old_context_len": rope.llama3.original_context,
        }
    if rope.frequencies is not None:
        # Without a base, a NeMo that does not know the frequencies fails at once.
        config |= {"rotary_base": None, "rope_frequencies": list(rope.frequencies)}
    return config


def _limits(model: Model) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if model.window is not None:
        config["window_size"] = [model.window - 1, 0]
    if model.max_tokens is not None:
        config["max_tokens"] = model.max_tokens
    if model.rope.attention_factor != 1:  # of queries and of keys
        config["softmax_scale"] = model.rope.attention_factor**2 / math.sqrt(model.head_dim)
    return config


def _experts(experts: Experts | None) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        "moe_router_topk": experts.active,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        # Softmax over all experts, or over the active ones alone.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": 1,
    }
