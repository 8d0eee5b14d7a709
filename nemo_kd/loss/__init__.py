"""Top-K distillation beside cross-entropy, from one pass over vocabulary-parallel logits.

Torch alone: process groups come in as arguments. `reference` is the dense float64 oracle.
"""

from nemo_kd.loss.config import KDConfig
from nemo_kd.loss.divergences import DIVERGENCES
from nemo_kd.loss.fused_linear import linear_sft_kd_loss
from nemo_kd.loss.metrics import MassWatch
from nemo_kd.loss.objective import KDLoss, sft_kd_loss
from nemo_kd.loss.primitive import gather_logits_and_logsumexp
from nemo_kd.loss.schedule import KDSchedule
from nemo_kd.loss.supports import SUPPORTS
from nemo_kd.loss.topk import check_teacher, vocab_parallel_topk
from nemo_kd.topk import TopK

__all__ = [
    "DIVERGENCES",
    "SUPPORTS",
    "KDConfig",
    "KDLoss",
    "KDSchedule",
    "MassWatch",
    "TopK",
    "check_teacher",
    "gather_logits_and_logsumexp",
    "linear_sft_kd_loss",
    "sft_kd_loss",
    "vocab_parallel_topk",
]
