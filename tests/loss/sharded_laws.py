"""More checks for `ranks.Ranks`: any shape, what is communicated, ranks without answer tokens."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import profile

from nemo_kd.loss import (
    DIVERGENCES,
    SUPPORTS,
    KDConfig,
    TopK,
    gather_logits_and_logsumexp,
    linear_sft_kd_loss,
    reference,
    sft_kd_loss,
    vocab_parallel_topk,
)
from tests.loss.ranks import Check
from tests.loss.sharded import (
    columns,
    dense_gradient,
    group,
    padded,
    single,
    student_logits,
    teacher_rows,
)

KINDS = sorted(DIVERGENCES)


def problem(seed: int) -> tuple[int, int, int, KDConfig, int]:
    """(N, V, K, configuration, seed), the awkward ones among them often; the same on every rank.

    Not hypothesis: a rank that shrinks its failure would leave the others waiting.
    """
    draw = random.Random(seed)
    v = draw.randint(2, 70)
    k = draw.choice([1, v, draw.randint(1, v)])
    support, divergence = draw.choice(sorted(SUPPORTS)), draw.choice(KINDS)
    if support == "vocab" and divergence == "reverse_kl":
        support = "bucket"
    config = KDConfig(
        alpha=draw.choice([0.0, 0.3, 1.0]),
        support=support,
        divergence=divergence,
        temperature=draw.choice([0.5, 1.0, 2.0]),
    )
    return draw.choice([1, 2, 7]), v, k, config, seed


def check_problem(number: int) -> None:
    n, v, k, config, seed = problem(number)
    whole = student_logits((n,), v, torch.float32, seed)
    teacher = teacher_rows(n, v, k, config.temperature, seed)
    if seed % 4 == 0:  # all of the teacher's ids on the first shard, as far as they fit
        teacher = replace(teacher, ids=torch.arange(k).expand(n, k))
    labels = torch.randint(v, (n,), generator=torch.Generator().manual_seed(seed))
    shard = whole[:, columns(padded(v))].clone().requires_grad_()
    result = sft_kd_loss(shard, labels, teacher, config, group=group(), vocab_size=v)
    result.loss.sum().backward()
    expected, gradient = dense_gradient(whole[:, :v], labels, teacher, config, torch.ones(n))
    torch.testing.assert_close(result.loss.detach().double(), expected, rtol=1e-6, atol=1e-6)
    dense = torch.nn.functional.pad(gradient, (0, padded(v) - v))[:, columns(padded(v))]
    assert shard.grad is not None
    error = (shard.grad.double() - dense).abs().max()
    assert error <= 1e-6 * max(1.0, float(gradient.abs().max())), problem(number)


def check_any_problem() -> None:
    for number in range(40):
        check_problem(number)


def check_many_problems() -> None:
    for number in range(1500):
        check_problem(number)


def collectives(recorded: profile) -> list[tuple[str, list[int]]]:
    """(kind, shape) of what gloo was asked to move, in order."""
    events = [event for event in recorded.events() or [] if event.name.startswith("gloo:")]
    return [(event.name, list(event.input_shapes[0])) for event in events]


def check_what_is_communicated() -> None:
    """Two all-reduces, none wider than K + 2, and none in the backward pass."""
    n, v, k = 6, 40, 5
    if dist.get_world_size() == 1:
        return
    z = student_logits((n,), v, torch.float32, 1)[:, columns(padded(v))].requires_grad_()
    labels = torch.zeros(n, dtype=torch.int64)
    mine: dict[str, Any] = {"group": group(), "vocab_size": v}
    for temperature, width in ((1.0, k + 2), (2.0, k + 3)):
        teacher = teacher_rows(n, v, k, temperature, 1)
        config = KDConfig(temperature=temperature)
        with profile(record_shapes=True) as forward:
            loss = sft_kd_loss(z, labels, teacher, config, **mine).loss.sum()
        with profile(record_shapes=True) as backward:
            loss.backward()
        assert collectives(forward) == [
            ("gloo:all_reduce", [n]),
            ("gloo:all_reduce", [n, width]),
        ]
        assert collectives(backward) == []
    with profile(record_shapes=True) as topk:
        vocab_parallel_topk(z.detach(), k, **mine)
    assert collectives(topk) == [("gloo:all_gather", [n, k]), ("gloo:all_reduce", [n, 1])]


def check_repeated_ids_and_logsumexp() -> None:
    z = student_logits((5, 2), 37, torch.float32, 4)
    ids = torch.randint(37, (5, 2, 6), generator=torch.Generator().manual_seed(4))
    ids[..., -1] = ids[..., 0]
    shard = z[..., columns(padded(37))].clone().requires_grad_()
    picked, logsumexp = gather_logits_and_logsumexp(shard, ids, group=group(), vocab_size=37)
    (picked.sin().sum() + (logsumexp**2).sum()).backward()
    dense = z[..., :37].double().requires_grad_()
    expected = dense.gather(-1, ids), dense.logsumexp(-1)
    (expected[0].sin().sum() + (expected[1] ** 2).sum()).backward()
    torch.testing.assert_close(picked.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logsumexp.double(), expected[1], rtol=1e-6, atol=1e-6)
    assert shard.grad is not None and dense.grad is not None
    whole = torch.nn.functional.pad(dense.grad, (0, padded(37) - 37))
    mine = whole[..., columns(padded(37))]
    torch.testing.assert_close(shard.grad.double(), mine, rtol=1e-5, atol=1e-5)


def check_padding_counts_when_asked() -> None:
    """`count_padding` is the loss over all padded columns, as NeMo has it."""
    v, n, k = 21, 4, 3
    whole = student_logits((n,), v, torch.float32, 2)
    whole[:, v:] = 0.0
    teacher = teacher_rows(n, v, k, 1.0, 2)
    config = KDConfig(count_padding=True)
    shard, labels = whole[:, columns(padded(v))], torch.arange(n)
    loss = sft_kd_loss(shard, labels, teacher, config, group=group(), vocab_size=v).loss
    expected = reference.sft_kd_loss(whole, labels, teacher, config)[0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def check_one_data_parallel_rank_without_answers() -> None:
    """Half of the ranks, a tensor-parallel group of their own, have no answer token: no hang."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return
    halves = [list(range(ranks // 2)), list(range(ranks // 2, ranks))]
    groups = [dist.new_group(half) for half in halves]
    second = dist.get_rank() >= ranks // 2
    v, width, each = 18, 24, 24 // (ranks // 2)
    place = dist.get_rank() % (ranks // 2)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, generator=generator).requires_grad_()
    weight = torch.randn(width, 6, generator=generator)[place * each : (place + 1) * each]
    weight.requires_grad_()
    mask = torch.full((4,), not second)
    teacher = teacher_rows(int(mask.sum()), v, 3, 1.0, 0)
    options = {"group": groups[second], "vocab_size": v, "mask": mask}
    arguments = (torch.zeros(4, dtype=torch.int64), teacher, KDConfig())
    losses = (
        sft_kd_loss(hidden @ weight.t(), *arguments, **options).loss,
        linear_sft_kd_loss(hidden, weight, *arguments, **options).loss,
    )
    for loss in losses:
        hidden.grad = weight.grad = None
        loss.sum().backward()
        for parameter in (hidden, weight):
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            assert bool(parameter.grad.any()) != second
            dist.all_reduce(parameter.grad)  # as data parallelism would
        assert bool(loss.any()) != second


def check_metrics_do_not_depend_on_the_sharding() -> None:
    n, v, k, temperature = 9, 33, 4, 2.0
    whole = student_logits((n,), v, torch.float32, 8)
    teacher_z = 3 * torch.randn(n, v, generator=torch.Generator().manual_seed(9))
    teacher_z[:3] = whole[:3, :v]
    teacher = single(reference.topk(teacher_z, k, temperature))
    labels = whole[:, :v].argmax(1).clone()
    labels[5:] = (labels[5:] + 1) % v
    p, q = (z.double().div(temperature).softmax(1) for z in (teacher_z, whole[:, :v]))

    def entropy(distribution: torch.Tensor) -> torch.Tensor:
        kept = distribution.gather(1, teacher.ids)
        points = torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)
        return -torch.xlogy(points, points).sum(1)

    best = whole[:, :v].argmax(1)
    expected = {
        "teacher_mass": p.gather(1, teacher.ids).sum(1),
        "student_mass": q.gather(1, teacher.ids).sum(1),
        "teacher_entropy": entropy(p),
        "student_entropy": entropy(q),
        "top1_teacher": (best == teacher.ids[:, 0]).double(),
        "top1_label": (best == labels).double(),
        "confidence": whole[:, :v].double().softmax(1).amax(1),
    }
    for support in SUPPORTS:
        config = KDConfig(support=support, temperature=temperature)
        shard = whole[:, columns(padded(v))]
        found = sft_kd_loss(shard, labels, teacher, config, group=group(), vocab_size=v).metrics
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=2e-6, msg=name)


def check_absent_ids(divergence: str) -> None:
    """Rows of 1 to 9 ids in a teacher nine wide: each as the dense loss has it on its own ids."""
    n, v, width = 8, 40, 9
    whole = student_logits((n,), v, torch.float32, seed=11)
    labels = torch.randint(v, (n,), generator=torch.Generator().manual_seed(12))
    for support, temperature in itertools.product(SUPPORTS, (1.0, 2.0)):
        if (divergence, support) == ("reverse_kl", "vocab"):
            continue
        config = KDConfig(divergence=divergence, support=support, temperature=temperature)
        full = teacher_rows(n, v, width, temperature, seed=13)
        absent = torch.arange(width) > torch.arange(n).unsqueeze(1)  # row i has i + 1 ids
        ids = full.ids.masked_fill(absent, -1)
        teacher = replace(full, ids=ids, logits=full.logits.masked_fill(absent, -torch.inf))
        shard = whole[:, columns(padded(v))].clone().requires_grad_()
        result = sft_kd_loss(shard, labels, teacher, config, group=group(), vocab_size=v)
        result.loss.sum().backward()
        assert shard.grad is not None and full.logsumexp is not None
        for i in range(n):
            one = slice(i, i + 1)
            own = TopK(
                ids=full.ids[one, : i + 1],
                logits=full.logits[one, : i + 1],
                logsumexp=full.logsumexp[one],
                temperatures=(temperature,),
            )
            expected, gradient = dense_gradient(
                whole[one, :v], labels[one], own, config, torch.ones(1)
            )
            torch.testing.assert_close(
                result.loss[one].detach().double(), expected, rtol=1e-6, atol=1e-6
            )
            dense = torch.nn.functional.pad(gradient, (0, padded(v) - v))[:, columns(padded(v))]
            torch.testing.assert_close(shard.grad[one].double(), dense, rtol=0, atol=1e-6)


LAWS: tuple[Check, ...] = (
    *(partial(check_absent_ids, divergence) for divergence in KINDS),
    check_any_problem,
    check_what_is_communicated,
    check_repeated_ids_and_logsumexp,
    check_padding_counts_when_asked,
    check_one_data_parallel_rank_without_answers,
    check_metrics_do_not_depend_on_the_sharding,
)
