"""The losses inside `torch.compile`: a graph break, and the values and gradients of eager mode."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo

from nemo_kd.loss import (
    DIVERGENCES,
    KDConfig,
    TopK,
    check_teacher,
    gather_logits_and_logsumexp,
    linear_sft_kd_loss,
    sft_kd_loss,
    vocab_parallel_topk,
)
from nemo_kd.loss.primitive import Gathered
from nemo_kd.loss.terms import token_terms
from nemo_kd.loss.weights import combine
from nemo_kd.mcore import cpu

H, V, VP = 16, 61, 64
Model = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, TopK], torch.Tensor]


def of_logits(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, teacher: TopK
) -> torch.Tensor:
    z = torch.tanh(hidden) @ weight.t()
    mask = labels % 5 > 0
    rows = teacher[mask]
    config = KDConfig(alpha=0.7, divergence="reverse_kl")
    result = sft_kd_loss(z, labels, rows, config, vocab_size=V, mask=mask, inplace=True)
    return 3 * result.loss.sum() + result.kd.sin().sum()


def fused(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, teacher: TopK
) -> torch.Tensor:
    config = KDConfig(alpha=0.7)
    loss = linear_sft_kd_loss(torch.tanh(hidden), weight, labels, teacher, config, vocab_size=V)
    return 2 * loss.loss.sum()


def gathered(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, teacher: TopK
) -> torch.Tensor:
    z = torch.tanh(hidden) @ weight.t()
    picked, total = gather_logits_and_logsumexp(z, labels[:, None], vocab_size=V)
    return (total - picked.squeeze(-1)).square().sum()


def with_teacher(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, teacher: TopK
) -> torch.Tensor:
    z = torch.tanh(hidden) @ weight.t()
    own = vocab_parallel_topk(2 * z.detach() + 1, 5, vocab_size=V)
    check_teacher(own, V)
    return sft_kd_loss(z, labels, own, KDConfig(), vocab_size=V).loss.sum()


def run(model: Model, rows: int) -> list[torch.Tensor]:
    """The loss and the gradients of hidden [rows, H] and weight."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, H, generator=generator).requires_grad_()
    weight = torch.randn(VP, H, generator=generator).requires_grad_()
    labels = torch.randint(V, (rows,), generator=generator)
    teacher = vocab_parallel_topk(torch.randn(rows, VP, generator=generator), 10, vocab_size=V)
    loss = model(hidden, weight, labels, teacher)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


@pytest.fixture(autouse=True)
def without_the_patches_for_a_cpu() -> Iterator[None]:
    """Another file's tests may have left them in this process."""
    mode = cpu._state.device_mode
    if mode is not None:
        mode.__exit__(None, None, None)
    yield
    if mode is not None:
        mode.__enter__()


@pytest.mark.parametrize("model", [of_logits, fused, gathered, with_teacher])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_has_eager_values_and_gradients(model: Model, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    for rows in (7, 12, 1, 0, 30):
        for mine, eager in zip(run(compiled, rows), run(model, rows), strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)


def test_the_patches_for_a_cpu_compile_to_the_same_values() -> None:
    torch.compiler.reset()
    compiled = torch.compile(of_logits, backend="aot_eager")
    with cpu._CudaMeansCpu():
        for rows in (7, 12):
            for mine, eager in zip(run(compiled, rows), run(of_logits, rows), strict=True):
                torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)


def terms(
    picked: torch.Tensor, outside: torch.Tensor, top: torch.Tensor, ids: torch.Tensor, rows: TopK
) -> torch.Tensor:
    """The losses of tokens from what the passes over the logits leave: all that is on [N, K]."""
    gathered = Gathered(picked, (outside,), top)
    nll, kd, metrics = token_terms(gathered, ids, rows, terms_config, V)
    return combine(nll, kd, terms_config.weights) + 0 * metrics["student_entropy"]


terms_config = KDConfig(alpha=0.7)


def gathered_rows(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, TopK]:
    """The arguments of `terms` for random logits [rows, V] and their teacher's ten ids."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, V, generator=generator)
    teacher = vocab_parallel_topk(torch.randn(rows, V, generator=generator), 10)
    labels = torch.randint(V, (rows, 1), generator=generator)
    ids = torch.cat([labels, teacher.ids], 1)
    left = logits.scatter(1, ids, -torch.inf)
    top = left.amax(-1)
    outside = (left - top[:, None]).logsumexp(-1)
    return logits.gather(1, ids).requires_grad_(), outside.requires_grad_(), top, ids, teacher


@pytest.mark.parametrize(
    ("backend", "divergence"),
    [
        ("aot_eager", "forward_kl"),
        *(
            pytest.param("aot_eager", d, marks=pytest.mark.slow)
            for d in DIVERGENCES
            if d != "forward_kl"
        ),
        *(pytest.param("inductor", d, marks=pytest.mark.slow) for d in DIVERGENCES),
    ],
)
def test_the_loss_of_k_ids_is_one_graph_for_any_number_of_tokens(
    backend: str, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "terms_config", KDConfig(divergence=divergence))
    torch.compiler.reset()
    compiled = torch.compile(terms, backend=backend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 12, 30):
            results = []
            for function in (compiled, terms):
                picked, outside, top, ids, teacher = gathered_rows(rows)
                loss = function(picked, outside, top, ids, teacher)
                loss.sum().backward()
                results.append((loss.detach(), picked.grad, outside.grad))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_full_graph_is_refused_with_the_reason() -> None:
    torch.compiler.reset()
    with pytest.raises(Exception, match="run as they are, between the compiled graphs"):
        run(torch.compile(of_logits, backend="eager", fullgraph=True), 7)
