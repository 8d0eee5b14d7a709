"""Merged adapters are added in float32 and rounded once, to the type of their layer's weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from omegaconf import OmegaConf

from nemo_kd.nemo.installed import has_adapters

pytestmark = pytest.mark.skipif(not has_adapters(), reason="this NeMo's model takes no adapters")
OUT, IN, DIM, ALPHA = 37, 23, 3, 5


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def adapter() -> Any:
    made: Any = torch.nn.Module()
    made.linear_in = torch.nn.Linear(IN, DIM, bias=False)
    made.linear_out = torch.nn.Linear(DIM, OUT, bias=False)
    made.input_is_parallel, made.alpha, made.dim = False, ALPHA, DIM
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    from nemo_kd.nemo.merge import BESIDE, merge_lora

    torch.manual_seed(2)
    attention: Any = torch.nn.Module()
    attention.linear_proj = torch.nn.Linear(IN, OUT, bias=False, dtype=dtype)
    name = next(key for key, layer in BESIDE.items() if layer == "linear_proj")
    attention.adapter_layer = torch.nn.ModuleDict({str(name.value): adapter()})
    a, b = (
        getattr(attention.adapter_layer[str(name.value)], part).weight.double()
        for part in ("linear_in", "linear_out")
    )
    exact = attention.linear_proj.weight.double() + ALPHA / DIM * (b @ a)
    model: Any = torch.nn.ModuleList([attention])
    model.cfg = OmegaConf.create({"peft": {"peft_scheme": "lora"}})
    assert merge_lora(model) == 1 and model.cfg.peft.peft_scheme == "none"
    merged = attention.linear_proj.weight
    assert merged.dtype == dtype
    # Float32's error of B A and the sum, before the one rounding.
    error = (merged.double() - exact).abs() - 1e-6
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs()).all()
