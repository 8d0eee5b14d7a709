"""Make NeMo's adapter mixins work with a newer Megatron-core.

NeMo 2.4 copies the forward passes of Megatron's attention and transformer layer in order to put
adapters into them. Megatron-core 0.13 calls both with arguments that the copies do not know
(`inference_context` among them), so no adapter can be trained on any device. This module runs
Megatron's own forward passes instead, and adds the adapters with hooks where the copies have them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from nemo.collections.nlp.modules.common.megatron.adapters import mcore_mixins
from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import AdapterName


def fit_adapters_to_megatron() -> None:
    """Replace NeMo's copies of Megatron's forward passes that reject Megatron's arguments."""
    for mixin, original, forward in (
        (mcore_mixins.MCoreSelfAttentionMixin, SelfAttention.forward, _attention_forward),
        (
            mcore_mixins.MCoreTransformerLayerMixin,
            TransformerLayer._forward_attention,  # `forward` passes all its arguments to it
            _layer_forward,
        ),
    ):
        if _knows_context(original) and not _knows_context(mixin.forward):
            mixin.forward = forward


def _knows_context(function: Callable[..., Any]) -> bool:
    return "inference_context" in inspect.signature(function).parameters


def _attention_forward(self: Any, *arguments: Any, **named: Any) -> Any:
    """Run Megatron's attention with the adapter of its output projection.

    The mixin's `get_query_key_value_tensors` applies the adapters of query, key and value.
    """
    dense = _enabled(self, AdapterName.LORA_DENSE_ATTENTION_ADAPTER)
    with _added(self.linear_proj, dense and (lambda output, given: output + dense(given))):
        return SelfAttention.forward(self, *arguments, **named)


def _layer_forward(self: Any, *arguments: Any, **named: Any) -> Any:
    before = _enabled(self, AdapterName.PRE_ATTN_ADAPTER)
    after = _enabled(self, AdapterName.POST_ATTN_ADAPTER)
    with (
        _added(self.self_attention, before and (lambda output, _: output + before(output))),
        _added(self.mlp, after and (lambda output, _: output + after(output))),
    ):
        return TransformerLayer.forward(self, *arguments, **named)


def _enabled(module: Any, name: str) -> Any:
    """Return the adapter `name` of a module if it is enabled, else None."""
    if not module.is_adapter_available():
        return None
    adapter = module.get_adapter_module(name)
    return adapter if adapter and module.adapter_cfg[name]["enabled"] else None


@contextmanager
def _added(
    module: torch.nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
) -> Iterator[None]:
    """Replace the first of `module`'s two results with `change(result, input)` in the context."""
    if change is None:
        yield
        return
    handle = module.register_forward_hook(
        lambda _, given, results: (change(results[0], given[0]), results[1])
    )
    try:
        yield
    finally:
        handle.remove()
