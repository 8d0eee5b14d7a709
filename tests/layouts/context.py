"""NeMo's own cut of a batch over context-parallel ranks, and our loss on it: `torchrun … RESULT`.

All but the attention, which a CPU has not for cut sequences: logits are a table of the tokens.
Rank 0 writes how far its results are from those of the whole batch in one process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nemo_kd.nemo import cpu

B, S, V, K = 3, 64, 50, 6


def main(result: str) -> None:
    cpu.install()
    import torch
    from megatron.core import parallel_state
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    from nemo_kd.data import answer_tokens
    from nemo_kd.mcore.context import own_positions
    from nemo_kd.mcore.metrics import MetricSums
    from nemo_kd.nemo.config import KDTrainingConfig
    from nemo_kd.nemo.student_loss import StudentLoss
    from nemo_kd.topk import TopK

    torch.distributed.init_process_group("gloo")
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=size)

    random = torch.Generator().manual_seed(0)
    whole = {name: torch.randint(V, (B, S), generator=random) for name in ("tokens", "labels")}
    whole["position_ids"] = torch.arange(S).expand(B, -1)
    whole["loss_mask"] = (torch.rand(B, S, generator=random) < 0.3).float()
    whole["loss_mask"][1] = 0
    whole["loss_mask"][2, : S // (2 * size)] = 1  # the first rank has most of them
    teachers = []
    for row in whole["loss_mask"]:
        logits = torch.randn(int(row.sum()), V, generator=random)
        top = logits.topk(K)
        teachers.append(
            TopK(
                ids=top.indices.numpy(),
                logits=top.values.numpy(),
                logsumexp=logits.logsumexp(-1).numpy(),
            )
        )
    table = torch.randn(V, V, generator=random)

    def one(cut: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """A micro-batch as the model has it: its loss, the table's gradient, the metrics."""
        batch, weight = dict(whole), table.clone().requires_grad_()
        student = StudentLoss(KDTrainingConfig(alpha=0.4), V, 0)
        at = own_positions(S) if cut else None
        sums = MetricSums()
        student.begin(KDTrainingConfig(alpha=0.4), sums, training=True)
        student.hand_over(answer_tokens(batch["loss_mask"], teachers, own_positions=at))
        batch["num_valid_tokens_in_ub"] = batch["loss_mask"].sum()
        if cut:
            batch = MegatronGPTModel.get_batch_on_this_context_parallel_rank(None, dict(whole))
            assert batch["tokens"].equal(whole["tokens"][:, at])
        losses = student.of_logits(batch["labels"], weight[batch["tokens"].t()])
        count = batch["num_valid_tokens_in_ub"]
        if not cut:
            loss = (losses * batch["loss_mask"]).sum() / count
            loss.backward()
            assert weight.grad is not None
            return loss.detach(), weight.grad, sums.means()
        loss = MegatronGPTModel.loss_func(None, batch["loss_mask"], count, losses)
        (loss * size).backward()  # as NeMo, before the mean over data- and context-parallel ranks
        assert weight.grad is not None
        torch.distributed.all_reduce(weight.grad)
        return loss.detach(), weight.grad / size, sums.means()

    (loss, gradient, means), (expected, its_gradient, its_means) = one(True), one(False)
    if torch.distributed.get_rank() == 0:
        found = {
            "loss": float((loss - expected).abs()),
            "gradient": float((gradient - its_gradient).abs().max()),
            "largest_gradient": float(its_gradient.abs().max()),
            "metrics": {name: abs(means[name] - its_means[name]) for name in its_means},
        }
        Path(result).write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
