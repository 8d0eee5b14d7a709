"""The families of models: how each is configured, and what Megatron calls its tensors.

A decoder layer of every family is

    h = x + attention(norm(x));  layer(x) = h + mlp(norm(h))

Families differ in the settings below. A `Part` is one Megatron tensor and the Hugging Face tensors
that it is made of; it converts in both directions, exactly. To add a family, add an entry to
`FAMILIES` and a model to tests/checkpoints/models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nemo_kd.checkpoints.model import CheckpointError, Model

Tensors = Sequence[torch.Tensor]
LAYERS = "model.layers"


@dataclass(frozen=True)
class MixtureNames:
    """Hugging Face's names of a mixture of experts, and the keys of its sizes in `config.json`."""

    block: str
    gate: str
    up: str
    down: str
    number: str
    ffn: str
    normalized: str | None
    """Key that says whether the active experts' weights sum to one; None: they always do."""


@dataclass(frozen=True)
class Family:
    """What the models of one architecture share."""

    model_type: str
    norm: Literal["rmsnorm", "layernorm1p"] = "rmsnorm"
    """`layernorm1p`: LayerNorm with biases, whose stored weight is one less than the factor."""
    norm_eps: str = "rms_norm_eps"
    """Key in `config.json`."""
    gated: bool = True
    """`W_down(silu(W_gate n) * W_up n)`; otherwise `W_down(relu(W_up n)^2)`."""
    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    """Queries, keys and values are one tensor, and so are gate and up."""
    mixture: MixtureNames | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `config.json` that have one value in all convertible models, the default."""
    rotary_fraction: float | None = None
    """Default of `partial_rotary_factor`; None: heads are rotated whole."""
    windowed: bool = False
    """Whether `sliding_window` applies to all layers without further settings."""

    @property
    def activation(self) -> str:
        return "silu" if self.gated else "relu2"


NO_BIAS = {"attention_bias": False, "mlp_bias": False}
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", fixed=NO_BIAS),
    "MistralForCausalLM": Family("mistral", windowed=True),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, fixed={"attention_bias": False}),
    "Phi3ForCausalLM": Family(
        "phi3",
        fused=True,
        windowed=True,
        fixed={"resid_pdrop": 0.0, "embd_pdrop": 0.0},
        rotary_fraction=1.0,
    ),
    "NemotronForCausalLM": Family(
        "nemotron",
        norm="layernorm1p",
        norm_eps="norm_eps",
        gated=False,
        fixed=NO_BIAS,
        rotary_fraction=0.5,
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        windowed=True,
        mixture=MixtureNames(
            block="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
            number="num_local_experts",
            ffn="intermediate_size",
            normalized=None,
        ),
        fixed={"router_jitter_noise": 0.0},
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        qk_norm=True,
        mixture=MixtureNames(
            block="mlp",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            number="num_experts",
            ffn="moe_intermediate_size",
            normalized="norm_topk_prob",
        ),
        fixed={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}
REFUSED = {
    "Gemma2ForCausalLM": "NeMo's Gemma 2 needs TransformerEngine's layers with two more norms",
    "GemmaForCausalLM": "its embedding is scaled, which Megatron-core 0.13 does not do",
    "DeepseekV3ForCausalLM": "its attention is a latent one",
}
"""Architectures that are often asked for, and why they are not converted."""


@dataclass(frozen=True)
class Part:
    """One Megatron tensor, and the Hugging Face tensors that it is made of."""

    megatron: str
    """Name within the layer, or within the model for a tensor outside the layers."""
    shape: tuple[int, ...]
    """Megatron's shape, without the axes of layers and experts."""
    shapes: Mapping[str, tuple[int, ...]]
    """Hugging Face's names and shapes, in the order of `join`; weights are `[out, in]`."""
    join: Callable[[Tensors], torch.Tensor] = lambda tensors: tensors[0]
    split: Callable[[torch.Tensor], Tensors] = lambda tensor: [tensor]
    expert: tuple[int, int] | None = None
    """(number, count) of the expert that it belongs to."""
    vocabulary: bool = False
    """Whether the first axis has a row for each token id; Megatron pads it."""


def family_of(model: Model) -> Family:
    return FAMILIES[model.architecture]


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model, name → shape."""
    return {name: shape for part, _ in parts_of(model) for name, shape in part.shapes.items()}


def parts_of(model: Model) -> Iterator[tuple[Part, int | None]]:
    """Yield each of Megatron's tensors, and its layer; None outside the layers."""
    for part in global_parts(model):
        yield part, None
    for layer in range(model.num_layers):
        for part in layer_parts(model, layer):
            yield part, layer


def global_parts(model: Model) -> Iterator[Part]:
    """Yield the tensors outside the layers."""
    table = (model.vocab_size, model.hidden_size)
    yield _same(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", table, vocabulary=True
    )
    yield from _norm(model, "decoder.final_layernorm.", "model.norm")
    if not model.tied:
        yield _same("output_layer.weight", "lm_head.weight", table, vocabulary=True)


def layer_parts(model: Model, layer: int) -> Iterator[Part]:
    """Yield the tensors of one layer."""
    family, prefix = family_of(model), f"{LAYERS}.{layer}."
    attention = f"{prefix}self_attn."
    width = model.num_heads * model.head_dim
    yield from _norm(model, "self_attention.linear_qkv.layer_norm_", f"{prefix}input_layernorm")
    yield from _qkv(model, attention)
    if family.qk_norm:
        for one in "qk":
            name = f"{attention}{one}_norm.weight"
            yield _same(f"self_attention.{one}_layernorm.weight", name, (model.head_dim,))
    yield _same(
        "self_attention.linear_proj.weight",
        f"{attention}o_proj.weight",
        (model.hidden_size, width),
    )
    before_mlp = "pre_mlp_layernorm." if family.mixture else "mlp.linear_fc1.layer_norm_"
    yield from _norm(model, before_mlp, f"{prefix}post_attention_layernorm")
    yield from _mixture(model, prefix) if family.mixture else _mlp(model, f"{prefix}mlp.")


def _same(megatron: str, name: str, shape: tuple[int, ...], **settings: Any) -> Part:
    return Part(megatron, shape, {name: shape}, **settings)


def _norm(model: Model, megatron: str, name: str) -> Iterator[Part]:
    kinds = ("weight", "bias") if family_of(model).norm == "layernorm1p" else ("weight",)
    for kind in kinds:
        yield _same(f"{megatron}{kind}", f"{name}.{kind}", (model.hidden_size,))


def _qkv(model: Model, attention: str) -> Iterator[Part]:
    family, hidden = family_of(model), model.hidden_size
    rows = [heads * model.head_dim for heads in (model.num_heads, *[model.num_kv_heads] * 2)]
    kinds = ("weight", "bias") if family.qkv_bias else ("weight",)
    for kind in kinds:
        inner = (hidden,) if kind == "weight" else ()
        if family.fused:
            shapes = {f"{attention}qkv_proj.{kind}": (sum(rows), *inner)}
        else:
            shapes = {
                f"{attention}{one}_proj.{kind}": (size, *inner)
                for one, size in zip("qkv", rows, strict=True)
            }

        def join(tensors: Tensors) -> torch.Tensor:
            parts = tensors[0].split(rows) if family.fused else tensors
            return by_query_group(parts, model)

        def split(tensor: torch.Tensor) -> Tensors:
            parts = from_query_groups(tensor, model)
            return [torch.cat(list(parts))] if family.fused else parts

        yield Part(f"self_attention.linear_qkv.{kind}", (sum(rows), *inner), shapes, join, split)


def by_query_group(qkv: Tensors, model: Model) -> torch.Tensor:
    """`[H D, …], [G D, …], [G D, …]` → `[G (H/G + 2) D, …]`: of each group its queries, its key,
    its value; H heads, G query groups, D head size."""
    groups, inner = model.num_kv_heads, qkv[0].shape[1:]
    parts = [one.reshape(groups, -1, model.head_dim, *inner) for one in qkv]
    return torch.cat(parts, dim=1).reshape(-1, *inner)


def from_query_groups(tensor: torch.Tensor, model: Model) -> Tensors:
    """Undo `by_query_group`."""
    groups, inner = model.num_kv_heads, tensor.shape[1:]
    rows = tensor.reshape(groups, -1, model.head_dim, *inner)
    parts = rows.split([model.num_heads // groups, 1, 1], dim=1)
    return [part.reshape(-1, *inner) for part in parts]


def _mlp(model: Model, block: str) -> Iterator[Part]:
    family, ffn, hidden = family_of(model), model.ffn_hidden_size, model.hidden_size
    if family.fused:
        yield _same("mlp.linear_fc1.weight", f"{block}gate_up_proj.weight", (2 * ffn, hidden))
    elif family.gated:
        names = [f"{block}gate_proj.weight", f"{block}up_proj.weight"]
        yield _gate_and_up("mlp.linear_fc1.weight", names, (ffn, hidden))
    else:
        yield _same("mlp.linear_fc1.weight", f"{block}up_proj.weight", (ffn, hidden))
    yield _same("mlp.linear_fc2.weight", f"{block}down_proj.weight", (hidden, ffn))


def _gate_and_up(megatron: str, names: Sequence[str], shape: tuple[int, int], **more: Any) -> Part:
    """Gate above up."""
    return Part(
        megatron,
        (2 * shape[0], shape[1]),
        dict.fromkeys(names, shape),
        lambda tensors: torch.cat(list(tensors)),
        lambda tensor: tensor.chunk(2),
        **more,
    )


def _mixture(model: Model, prefix: str) -> Iterator[Part]:
    names, experts = family_of(model).mixture, model.experts
    assert names is not None and experts is not None
    block, shape = f"{prefix}{names.block}", (experts.ffn_hidden_size, model.hidden_size)
    router = (experts.number, model.hidden_size)
    yield _same("mlp.router.weight", f"{block}.gate.weight", router)
    for number in range(experts.number):
        one, place = f"{block}.experts.{number}", (number, experts.number)
        both = [f"{one}.{names.gate}.weight", f"{one}.{names.up}.weight"]
        yield _gate_and_up("mlp.experts.experts.linear_fc1.weight", both, shape, expert=place)
        down = f"{one}.{names.down}.weight"
        yield _same(
            "mlp.experts.experts.linear_fc2.weight", down, (shape[1], shape[0]), expert=place
        )


# A buffer that older versions of transformers saved; it follows from the configuration.
IGNORED = ("rotary_emb.inv_freq",)


def check_tensors(name: str, model: Model, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the tensors `found` are exactly those of `model`."""
    expected = shapes_of(model)
    missing = [key for key in expected if key not in found]
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of {len(expected)} tensors that its configuration "
            f"({model.num_layers} layers) requires (first: {missing[0]}); is a shard missing?"
        )
    for key, shape in expected.items():
        if tuple(found[key]) != shape:
            raise CheckpointError(
                f"{name}: {key} has shape {tuple(found[key])}, but "
                f"the configuration requires {shape}; they belong to different models"
            )
    ignored = (*IGNORED, "lm_head.weight") if model.tied else IGNORED
    extra = [key for key in found if key not in expected and not key.endswith(ignored)]
    if extra:
        raise CheckpointError(
            f"{name} has {len(extra)} tensors that a {model.architecture} of its configuration "
            f"does not have (first: {extra[0]}); it cannot be converted"
        )
