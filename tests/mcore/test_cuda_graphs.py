"""CUDA graphs of full iterations are refused, as every version of Megatron-core names them."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig
from nemo_kd.mcore import kd_forward_step
from nemo_kd.mcore.cuda_graphs import refuse_full_iteration
from tests.mcore.test_multi_token import Model

Scope = Enum("Scope", ["full_iteration", "full_iteration_inference", "attn"])


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_cuda_graph": True, "cuda_graph_scope": "full_iteration"},  # 0.14
        {"cuda_graph_impl": "local", "cuda_graph_scope": "attn,full_iteration"},  # 0.15
        {  # an older name of "local"
            "cuda_graph_impl": "none",
            "enable_cuda_graph": True,
            "cuda_graph_scope": ["full_iteration"],
        },
        {"cuda_graph_impl": "local", "cuda_graph_scope": [Scope.full_iteration]},  # 0.16, 0.17
        {"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []},  # 0.18, 0.19
        {"cuda_graph_impl": "none", "cuda_graph_modules": ["full_iteration"]},
    ],
)
def test_graphs_of_full_iterations_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(NemoKDError, match=r"model\.cuda_graph_\w+=full_iteration: .*single layers"):
        refuse_full_iteration(SimpleNamespace(**settings), lambda name: f"model.{name}")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cuda_graph_impl": "local", "cuda_graph_scope": "full"},
        {"cuda_graph_impl": "local", "cuda_graph_scope": [Scope.full_iteration_inference]},
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [Scope.attn]},
        {"cuda_graph_impl": "none", "cuda_graph_scope": ["full_iteration"]},  # no graphs
        {"enable_cuda_graph": False, "cuda_graph_scope": "full_iteration"},
    ],
)
def test_graphs_of_layers_are_accepted(settings: dict[str, Any]) -> None:
    refuse_full_iteration(SimpleNamespace(**settings))


def test_a_training_step_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(mtp_num_layers=None, cuda_graph_impl="full_iteration")
    monkeypatch.setattr(Model, "config", config)
    with pytest.raises(NemoKDError, match="cuda_graph_impl=full_iteration"):
        kd_forward_step(KDConfig(), 61)(iter([{}]), Model())
