"""Compare the loss with four other implementations of SFT + KD: time, memory, gradient error.

    python benchmarks/peers.py       # a table, benchmarks/results/peers.json, docs/loss.md

Megatron-core's own offline distillation needs Python 3.12 and `pip install megatron-core==0.19.2`;
where it cannot be imported, its rows say why. The others are not installed: each is written here
from its definition, and its gradient is compared with a float64 reference like everyone's.

Every step is 0.5 · cross-entropy + 0.5 · distillation of N tokens, K = 100, forward + backward,
with the teacher's rows in memory. Time: the minimum of several rounds, ours and theirs in turn,
with one thread for each process. Memory: the peak growth of a separate process, with its inputs.
Gradient error: the largest difference from float64 of a token's gradient, whose largest entries
are about 0.5; for random logits, and for a student with all but 1e-10 of its probability on the
teacher's K ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import loss as shared
from benchmarks.loss import Candidate, Step
from benchmarks.pages import write_table
from nemo_kd.loss import KDConfig, TopK, reference, sft_kd_loss

RESULT = Path(__file__).parent / "results" / "peers.json"
K = 100
CHECKED = 32
"""Number of rows whose gradient is compared."""
COLUMNS = {
    "logits": "logits",
    "shape": "shape",
    "tp": "TP",
    "against": "against",
    "support": "support",
    "ms": "ms",
    "their_ms": "theirs",
    "time_ratio": "ratio",
    "mb": "MB",
    "their_mb": "theirs",
    "memory_ratio": "ratio",
    "error": "gradient error",
    "their_error": "theirs",
    "certain_error": "certain student",
    "their_certain_error": "theirs",
}
Loss = Callable[[Tensor, Tensor, Any], Tensor]


# --- the losses: logits [N, Vp], labels [N], a teacher -> [N] -------------------------------------


def megatron(logits: Tensor, labels: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Megatron-core's two losses, with the calls and reductions of its `LossFuncCallable`.

    It computes the cross-entropy first, inside the model. In float32 that overwrites the logits
    which the distillation reads afterwards, so here the distillation comes first.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.training.distillation.cached_logits_loss import topk_kl_div

    log_p, ids = teacher
    ranks = dist.get_world_size()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    group = parallel_state.get_tensor_model_parallel_group()

    def distillation() -> Tensor:
        kd = topk_kl_div(states, log_p, ids, ranks, dist.get_rank(), group, True).view(-1)
        dist.all_reduce(kd.detach(), group=group)  # the values; each rank's gradient is its own
        return kd

    states = logits.unsqueeze(1)  # [S, B, Vp]
    if logits.dtype == torch.float32:
        kd = distillation()
        nll = vocab_parallel_cross_entropy(states, labels.unsqueeze(1))
    else:
        nll = vocab_parallel_cross_entropy(states, labels.unsqueeze(1))
        kd = distillation()
    return 0.5 * nll.view(-1) + 0.5 * kd


def stored_by_megatron(teacher: TopK, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities and ids, [S, B, K]."""
    assert teacher.logsumexp is not None
    log_p = teacher.logits - teacher.logsumexp.unsqueeze(-1)
    return log_p.unsqueeze(1), teacher.ids.unsqueeze(1)


class TopKAndCrossEntropy(torch.autograd.Function):
    """NeMo-Aligner's loss: softmax against softmax over the K, and the cross-entropy.

    Logits are sharded by column. As there, a copy of the logits is shifted by their maximum, a
    float32 softmax is kept, and the K's gradient is built in zeros [N, Vp].
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, teacher: TopK) -> Tensor:
        width = logits.shape[-1]
        top = logits.amax(-1, keepdim=True)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        shifted = (logits - top).float()
        columns = torch.cat([labels.unsqueeze(-1), teacher.ids], -1) - dist.get_rank() * width
        here = (columns >= 0) & (columns < width)  # [N, 1 + K]
        columns = columns.clamp(0, width - 1)
        picked = shifted.gather(-1, columns) * here
        dist.all_reduce(picked)
        soft = shifted.exp()
        total = soft.sum(-1, keepdim=True)
        dist.all_reduce(total)
        soft.div_(total)
        log_p, log_q = teacher.logits.log_softmax(-1), picked[:, 1:].log_softmax(-1)
        kd = (log_p.exp() * (log_p - log_q)).sum(-1)
        ctx.save_for_backward(soft, columns, here, log_q.exp() - log_p.exp())
        return 0.5 * kd + 0.5 * (total.log().squeeze(-1) - picked[:, 0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        soft, columns, here, difference = ctx.saved_tensors
        gradient = torch.zeros_like(soft).scatter_add_(-1, columns[:, 1:], difference * here[:, 1:])
        soft.scatter_add_(-1, columns[:, :1], -here[:, :1].to(soft.dtype))
        gradient.add_(soft).mul_(0.5 * grads[0].unsqueeze(-1))
        return gradient, None, None


def aligner(logits: Tensor, labels: Tensor, teacher: TopK) -> Tensor:
    loss: Tensor = TopKAndCrossEntropy.apply(logits, labels, teacher)  # type: ignore[no-untyped-call]
    return loss


def distillkit(logits: Tensor, labels: Tensor, teacher: TopK) -> Tensor:
    """DistillKit's sparse KL, missing probability "zero", beside transformers' cross-entropy.

    The student's log-probabilities of the K ids over the vocabulary, in the logits' dtype, against
    the teacher's softmax over the K.
    """
    total = torch.logsumexp(logits.float(), -1, keepdim=True).to(logits.dtype)
    log_q = logits.gather(-1, teacher.ids) - total
    log_p = teacher.logits.log_softmax(-1).to(logits.dtype)
    kd = (log_p.exp() * (log_p - log_q)).sum(-1)
    return 0.5 * functional.cross_entropy(logits.float(), labels, reduction="none") + 0.5 * kd


def dense(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """The KL over the whole vocabulary and the cross-entropy, by PyTorch's functions."""
    log_q, log_p = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    kd = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return 0.5 * functional.cross_entropy(logits.float(), labels, reduction="none") + 0.5 * kd


def dense_teacher(teacher: TopK, width: int, dtype: torch.dtype) -> Tensor:
    """Logits [N, V]; 1e-13 of the largest probability outside the K, for the other losses 0."""
    logits = torch.full((len(teacher.ids), width), -30.0)
    return logits.scatter_(1, teacher.ids, teacher.logits).to(dtype)


class Peer(NamedTuple):
    """Another implementation, and the support of ours that has the same formula."""

    loss: Loss
    support: str
    sharded: bool
    teacher: Callable[[TopK, int, torch.dtype], Any] = lambda teacher, width, dtype: teacher


PEERS = {
    "Megatron-core 0.19": Peer(megatron, "bucket", True, stored_by_megatron),
    "NeMo-Aligner": Peer(aligner, "topk", True),
    "DistillKit, sparse": Peer(distillkit, "vocab", False),
    "dense in PyTorch": Peer(dense, "vocab", False, dense_teacher),
}


def obstacle(name: str, ranks: int) -> str | None:
    """Why a row cannot be measured here, or None."""
    if ranks > 1 and not PEERS[name].sharded:
        return "not measured: it has no tensor parallelism"
    # Not imported: processes that this one starts would begin with its peak of memory.
    if PEERS[name].loss is megatron and not _megatron_version().startswith("0.19"):
        return "not measured: needs megatron-core 0.19, and so Python 3.12"
    return None


def _megatron_version() -> str:
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return "none"


# --- candidates: each makes its inputs and returns (prepare a round, the timed step) --------------


class SameMemory(torch.autograd.Function):
    """The leaf's values as an LM head's output, which a loss may write over."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Case(NamedTuple):
    """One loss, by a peer's name or ours on a support, and its inputs."""

    leaf: Tensor
    labels: Tensor
    teacher: TopK
    loss: Callable[[], Tensor]


def case(n: int, v: int, dtype: str, who: str, k: int = K) -> Case:
    shard, labels, teacher = shared.inputs(n, v, k, getattr(torch, dtype))
    leaf = shard.requires_grad_()
    if who in PEERS:
        loss, _, _, convert = PEERS[who]
        given = convert(teacher, leaf.shape[-1], leaf.dtype)
    else:
        loss, given = ours(who, v), teacher
    return Case(leaf, labels, teacher, lambda: loss(logits_of(leaf), labels, given))


def logits_of(leaf: Tensor) -> Tensor:
    logits: Tensor = SameMemory.apply(leaf)  # type: ignore[no-untyped-call]
    return logits


def ours(support: str, size: int) -> Loss:
    config = KDConfig(alpha=0.5, support=support)

    def loss(logits: Tensor, labels: Tensor, teacher: TopK) -> Tensor:
        world = dist.group.WORLD
        return sft_kd_loss(
            logits, labels, teacher, config, group=world, vocab_size=size, inplace=True
        ).loss

    return loss


def candidate(n: int, v: int, dtype: str, who: str) -> tuple[Step, Step]:
    made = case(n, v, dtype, who)
    return shared.fresh(made.leaf), lambda: made.loss().mean().backward()


# --- measuring ------------------------------------------------------------------------------------


def times_and_errors(candidates: list[Candidate]) -> list[float]:
    """Per candidate the least seconds, in turn and with one thread for each process; then errors.

    Per candidate two gradient errors: for random logits, and for a certain student.
    """
    torch.set_num_threads(1)
    found = shared.times(candidates)
    for _, (_, v, dtype, who) in candidates:
        made = case(CHECKED, v, dtype, who)
        found += [gradient_error(made, v, who, raised) for raised in (0.0, 30.0)]
    return found


def gradient_error(made: Case, v: int, who: str, raised: float) -> float:
    """max |∂ Σ loss - float64's| over the rows and all ranks.

    `raised` is added to the student's logits of the teacher's ids.
    """
    leaf, labels, teacher, loss = made
    first, width = leaf.shape[-1] * dist.get_rank(), leaf.shape[-1]
    with torch.no_grad():
        leaf.normal_(generator=torch.Generator().manual_seed(dist.get_rank()))
        bonus = torch.zeros(len(leaf), v).scatter_(1, teacher.ids, raised)
        leaf += bonus[:, first : first + width].to(leaf.dtype)
    leaf.grad = None
    parts = [torch.empty_like(leaf) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, leaf.detach())
    loss().sum().backward()
    wanted = reference_gradient(torch.cat(parts, -1), labels, teacher, who)
    assert leaf.grad is not None
    difference = leaf.grad.double() - wanted[:, first : first + width]
    largest = difference.abs().max()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def reference_gradient(logits: Tensor, labels: Tensor, teacher: TopK, who: str) -> Tensor:
    support = PEERS[who].support if who in PEERS else who
    z = logits.double().requires_grad_()
    config = KDConfig(alpha=0.5, support=support)
    total = reference.sft_kd_loss(z, labels, teacher, config)[0].sum()
    (gradient,) = torch.autograd.grad(total, z)
    return gradient


def compare() -> list[dict[str, Any]]:
    return [
        row(n, v, dtype, ranks, name)
        for dtype in ("bfloat16", "float32")
        for n, v in shared.SHAPES
        for ranks in (1, 2)
        for name in PEERS
    ]


def row(n: int, v: int, dtype: str, ranks: int, name: str) -> dict[str, Any]:
    support = PEERS[name].support
    start = {"logits": dtype, "shape": f"({n}, {v})", "tp": ranks, "against": name}
    why = obstacle(name, ranks)
    if why is not None:
        return {**start, "support": support, "not_measured": why}
    both = [(candidate, [n, v, dtype, who]) for who in (support, name)]
    *seconds, error, certain, their_error, their_certain = shared.run(times_and_errors, both, ranks)
    bytes_ = [shared.grown(make, tuple(arguments), ranks) for make, arguments in both]
    return {
        **start,
        "support": support,
        "ms": round(1000 * seconds[0], 1),
        "their_ms": round(1000 * seconds[1], 1),
        "time_ratio": round(seconds[0] / seconds[1], 3),
        "mb": round(bytes_[0] / 1e6),
        "their_mb": round(bytes_[1] / 1e6),
        "memory_ratio": round(bytes_[0] / bytes_[1], 3),
        "error": f"{error:.1e}",
        "their_error": f"{their_error:.1e}",
        "certain_error": f"{certain:.1e}",
        "their_certain_error": f"{their_certain:.1e}",
    }


def cells(one: dict[str, Any]) -> list[str]:
    if "not_measured" in one:
        one = {**one, "against": f"{one['against']}: {one['not_measured']}"}
    return [str(one.get(key, "")) for key in COLUMNS]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*COLUMNS.values(), title="SFT + KD loss, forward + backward, K = 100")
    for one in rows:
        table.add_row(*cells(one))
    Console(width=170).print(table)


def table_of_page(result: dict[str, Any]) -> str:
    """The page's table: each figure of ours, then the peer's, and their ratio."""
    of = result["machine"]
    lines = [
        f"{of['processor']}, {of['cores']} cores, load {of['load']} at the start, Python "
        f"{of['python']}, torch {of['torch']}, commit {of['commit']}:",
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * 5 + "---:|" * (len(COLUMNS) - 5),
    ]
    return "\n".join([*lines, *("| " + " | ".join(cells(one)) + " |" for one in result["rows"])])


def main() -> None:
    about = shared.about_this_run()  # first: the code may change during the run
    rows = compare()
    show(rows)
    result = {"machine": about, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_table(shared.PAGE, "benchmarks/peers.py", table_of_page(result))


if __name__ == "__main__":
    main()
