"""Models with layers for multi-token prediction are refused, before a forward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig
from nemo_kd.mcore import kd_forward_step
from nemo_kd.mcore.teacher import TopKForward
from nemo_kd.teacher.layout import Layout
from tests.store.samples import spec

MESSAGE = "mtp_num_layers=1: multi-token prediction has no teacher, .*; set it to None"


class Model(torch.nn.Module):
    """A GPTModel by its settings."""

    config = SimpleNamespace(
        mtp_num_layers=1,
        sequence_parallel=False,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=1,
    )

    def forward(self, **_: Any) -> torch.Tensor:
        raise AssertionError("Megatron-core would compute the layers' loss here")


def test_a_student_with_them_is_refused() -> None:
    with pytest.raises(NemoKDError, match=MESSAGE):
        kd_forward_step(KDConfig(), 61)(iter([{}]), Model())


def test_a_teacher_with_them_is_refused() -> None:
    with pytest.raises(NemoKDError, match=MESSAGE):
        TopKForward(Model(), spec(), Layout(), 4)
