"""Run Megatron-core without CUDA: patches of torch and Megatron-core.

Call `install()` before any import of Megatron, some of whose decorators bind CUDA at import. It
does nothing if CUDA is available, so an entry point may always call it.

Not provided on the CPU: apex, TransformerEngine, FP8, FSDP.
"""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_state = types.SimpleNamespace(device_mode=None)


def install() -> bool:
    """Make Megatron-core run on the CPU; True when patched, False when CUDA is available."""
    if torch.cuda.is_available():
        return False
    if _state.device_mode is None:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        with without_apex_warnings():
            _patch_cuda_calls()
            _patch_cuda_tensors()
            _patch_autocast()
            _state.device_mode = _CudaMeansCpu()
            _state.device_mode.__enter__()
            _patch_megatron()
    return True


@contextmanager
def without_apex_warnings() -> Iterator[None]:
    """Silence the warnings that apex and TransformerEngine are missing, as is normal on a CPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Transformer Engine and )?Apex (is|are) not installed")
        yield


# --- torch -------------------------------------------------------------------------------------


def _nothing() -> Callable[..., None]:
    """Return a new no-op: torch._dynamo refuses one function object under two names."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return nothing


class _Stream:
    """A CUDA stream's interface without effect: a CPU runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def record_event(self, *args: Any) -> _Stream:
        return self


def _patch_cuda_calls() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed_all", "ipc_collect"):
        setattr(cuda, name, _nothing())
    for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    # Not torch.manual_seed, which calls torch.cuda.manual_seed and would recurse.
    cuda.manual_seed = lambda seed: (torch.default_generator.manual_seed(int(seed)), None)[1]
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device="cuda": (
        torch.set_rng_state(state)
    )
    cuda.get_rng_state_all = cuda.random.get_rng_state_all = lambda: [torch.get_rng_state()]
    device = types.SimpleNamespace(
        major=8, minor=0, name="cpu", total_memory=1 << 34, multi_processor_count=1
    )
    cuda.get_device_properties = lambda *args, **kwargs: device
    cuda.get_device_capability = lambda *args, **kwargs: (8, 0)
    cuda.Stream = cuda.Event = _Stream
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Stream())


def _patch_cuda_tensors() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    for name in ("Byte", "Int", "Long", "Half", "BFloat16", "Float"):
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


def _patch_autocast() -> None:
    """Make `autocast("cuda")` autocast on the CPU: unpatched, it silently runs in float32.

    `custom_fwd` binds autocast at import, and is replaced too.
    """
    autocast, forward, backward = torch.autocast, torch.amp.custom_fwd, torch.amp.custom_bwd

    class CpuAutocast(autocast):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str = "cpu", *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def custom_fwd(fwd: Any = None, *, device_type: str = "cpu", cast_inputs: Any = None) -> Any:
        return forward(fwd, device_type="cpu", cast_inputs=cast_inputs)

    def custom_bwd(bwd: Any = None, *, device_type: str = "cpu") -> Any:
        return backward(bwd, device_type="cpu")

    torch.autocast = torch.amp.autocast = CpuAutocast  # type: ignore[misc]
    torch.amp.custom_fwd, torch.amp.custom_bwd = custom_fwd, custom_bwd


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Replace `device="cuda"` in NeMo's and Megatron's calls with the CPU."""

    @torch.compiler.disable  # compiled, every call would reuse the first call's numbers
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = dict(kwargs, device=CPU)
        if kwargs.get("pin_memory"):  # pinning memory needs a CUDA device
            kwargs = dict(kwargs, pin_memory=False)
        if func is torch.Tensor.to:
            args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


class _TypesOfCuda(TorchFunctionMode):
    """Make `tensor.type()` return "torch.cuda.FloatTensor", which Megatron's optimizers check."""

    @torch.compiler.disable
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


# --- megatron-core -----------------------------------------------------------------------------


def local_layer_spec(config: Any) -> Any:
    """Megatron-core's layer of torch modules, for the model of a TransformerConfig.

    Checkpoints have the names of TransformerEngine's layers, in which the norm before a mixture of
    experts is a module of its own; Megatron's local layers call it by the name of a dense layer.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    if config.num_moe_experts is not None:
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return spec


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose weight is one less than the factor, as TransformerEngine's."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(
            input, self.normalized_shape, self.weight + 1, self.bias, self.eps
        )


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        """Build torch's norm, with its parameters marked for sequence parallelism."""
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        if config.layernorm_zero_centered_gamma and kind is torch.nn.LayerNorm:
            kind = ZeroCenteredLayerNorm
        module = kind(normalized_shape=hidden_size, eps=eps)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module

    WrappedTorchNorm.__new__ = norm
    if not hasattr(moe, "te_general_gemm"):  # the router reads it anyway
        moe.te_general_gemm = None
    _patch_packed_attention()
    _patch_megatron_optimizers()


def _patch_packed_attention() -> None:
    """Support packed sequences, for which Megatron needs TransformerEngine and a GPU.

    Each sequence of a pack goes through Megatron's torch attention separately: equivalent to a
    block-diagonal causal mask, without computing the masked scores.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    attention = DotProductAttention.forward

    def forward(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Return the attention's output; Megatron's own unless `packed_seq_params` is given.

        Packed: query [T, heads, width], key and value [T, groups, width] → [T, 1, hidden].
        """
        if packed_seq_params is None:
            return attention(
                self, query, key, value, attention_mask, attn_mask_type, attention_bias
            )
        ends = packed_seq_params.cu_seqlens_q_padded
        ends = packed_seq_params.cu_seqlens_q if ends is None else ends
        lengths = ends.diff().tolist()
        rows = (tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value))
        outputs = [
            attention(self, q, k, v, None, attn_mask_type)
            for q, k, v in zip(*rows, strict=True)
            if len(q)
        ]
        return torch.cat(outputs)

    DotProductAttention.forward = forward


def _patch_megatron_optimizers() -> None:
    """Show CUDA type names to the optimizers, which otherwise work on a CPU with gloo."""
    import megatron.core.optimizer.optimizer as optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Distributed

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _TypesOfCuda():
                return function(*args, **kwargs)

        return call

    optimizer.clip_grad_by_total_norm_fp32 = named(optimizer.clip_grad_by_total_norm_fp32)
    build = Distributed._build_model_and_main_param_groups.__func__
    Distributed._build_model_and_main_param_groups = classmethod(named(build))


# --- Megatron-LM -------------------------------------------------------------------------------


def install_megatron_lm() -> bool:
    """Make `megatron.training.pretrain` run on the CPU, over gloo; True when patched."""
    if not install():
        return False
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    start = initialize.initialize_megatron

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        """Start with one device visible: without any, Megatron-LM makes no parallel groups."""
        count = torch.cuda.device_count
        torch.cuda.device_count = lambda: 1
        try:
            return start(*args, allow_no_cuda=True, **kwargs)
        finally:
            torch.cuda.device_count = count

    training.initialize_megatron = initialize_megatron
    initialize._compile_dependencies = _nothing()  # CUDA kernels, and a builder of text data
    return True
