"""The losses of NeMo's model and of Megatron-core's loop, from logits to gradients and metrics.

On fake tensors, as in tests/loss/test_no_host_wait.py: what needs a tensor's values fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed._tools.fake_collectives  # lets collectives take fake tensors
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_kd.data import AnswerTokens
from nemo_kd.mcore.metrics import MetricSums
from nemo_kd.mcore.training import StepLoss
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.nemo.student_loss import StudentLoss
from nemo_kd.topk import TopK
from tests.loss.test_no_host_wait import CONFIGURATIONS

S, B, N, V, VP, K, H = 6, 3, 7, 20, 24, 5, 4


@pytest.fixture(autouse=True, params=[1, 2], ids="TP {}".format, scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many ranks the vocabulary is split over; the others are pretended."""
    size = request.param
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=size, create_gloo_process_groups=False
    )
    yield size
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def fake(ranks: int) -> Iterator[None]:
    with FakeTensorMode(), torch.device("meta"):
        yield


def answers(own_weights: bool) -> AnswerTokens:
    teacher = TopK(
        ids=torch.zeros(N, K, dtype=torch.int64),
        logits=torch.zeros(N, K),
        logsumexp=torch.zeros(N),
        temperatures=(2.0,),
    )
    positions = torch.zeros(N, dtype=torch.int64)
    return AnswerTokens(positions, teacher, torch.zeros(N) if own_weights else None)


def settings(ranks: int) -> Iterator[KDTrainingConfig]:
    """All of them in one process; over ranks, one divergence: the loss has a test of its own."""
    for config in CONFIGURATIONS:
        if ranks == 1 or config.divergence == "forward_kl":
            yield KDTrainingConfig(**vars(config))


class Stage(torch.nn.Module):
    """What a pipeline's last stage of Megatron's has for a loss: hidden states and the LM head."""

    post_process = True
    share_embeddings_and_output_weights = False
    config = SimpleNamespace(sequence_parallel=False, calculate_per_token_loss=True)

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.output_layer = torch.nn.Linear(H, VP // ranks, bias=False)
        self.output_layer.sequence_parallel = False  # type: ignore[assignment]

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        logits = hidden if not self.post_process else self.output_layer(hidden)
        return logits if labels is None else self.compute_language_model_loss(labels, logits)

    def compute_language_model_loss(self, labels: Any, logits: Any) -> torch.Tensor:
        raise AssertionError("Megatron's own cross-entropy has no part in these")


@pytest.mark.parametrize("own_weights", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_nemos_training_step_never_waits(ranks: int, fused: bool, own_weights: bool) -> None:
    for kd in settings(ranks):
        stage, sums = Stage(ranks), MetricSums()
        student = StudentLoss(kd, V, VP - V)
        student.attach(stage, fused)
        student.begin(kd, sums, training=True)
        for _ in range(2):  # micro-batches
            student.hand_over(answers(own_weights))
            labels = torch.zeros(B, S, dtype=torch.int64)
            losses = stage(torch.randn(S, B, H, requires_grad=True), labels=labels)
            # As NeMo's loss_func: a sum over the answer tokens, divided by their number.
            mask = torch.ones(B, S)
            (torch.sum(losses.view(-1) * mask.view(-1)) / mask.sum().clamp(min=1)).backward()
        assert stage.output_layer.weight.grad is not None and sums.sums is not None


@pytest.mark.parametrize("training", [True, False])
def test_megatron_cores_loss_function_never_waits(ranks: int, training: bool) -> None:
    for kd in settings(ranks):
        logits = torch.randn(B, S, VP // ranks, requires_grad=True)
        labels = torch.zeros(B, S, dtype=torch.int64)
        batch = {"labels": labels, "answers": answers(False)}
        loss, count, report = StepLoss(kd, V)(batch, Stage(ranks).train(training))(logits * 1)
        (loss / count).backward()
        assert logits.grad is not None and report["kd_loss"].shape == (2,)
