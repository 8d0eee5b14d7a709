"""Draws loss_supports.png: what each support asks of the student's probabilities.

python docs/images/loss_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from nemo_kd.loss import SUPPORTS, KDConfig, sft_kd_loss, vocab_parallel_topk

K, V = 4, 14
TITLES = {
    "bucket": "bucket: exact p of the K, the rest as one",
    "vocab": "vocab: p renormalised over the K",
    "topk": "topk: p and q renormalised over the K",
}


def main() -> None:
    teacher_z = torch.linspace(2.0, -1.0, V)[None]
    student_z = torch.tensor([[0.5, 1.6, 0.2, 0.4, 1.1, *torch.linspace(0.6, -0.6, V - 5)]])
    teacher = vocab_parallel_topk(teacher_z, K)
    p, q = teacher_z.softmax(-1)[0], student_z.softmax(-1)[0]
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.6), layout="constrained")
    place = torch.arange(V)
    first = axes[0, 0]
    first.bar(place - 0.2, p, 0.4, label="teacher", color="#6b7280")
    first.bar(place + 0.2, q, 0.4, label="student", color="#d97706")
    first.axvspan(-0.5, K - 0.5, color="#dbeafe", zorder=0, label="the K stored tokens")
    first.set_title("probabilities", loc="left", fontsize=10)
    first.legend(fontsize=8)
    for axis, support in zip(axes.flat[1:], SUPPORTS, strict=True):
        z = student_z.clone().requires_grad_()
        config = KDConfig(alpha=1.0, support=support)
        sft_kd_loss(z, torch.zeros(1, dtype=torch.int64), teacher, config).loss.sum().backward()
        axis.bar(place, -z.grad[0], color=["#2563eb"] * K + ["#93c5fd"] * (V - K))
        axis.axhline(0, color="#1f2937", linewidth=0.8)
        axis.axvspan(-0.5, K - 0.5, color="#dbeafe", zorder=0)
        axis.set_ylim(-0.3, 0.32)
        axis.set_title(f"push on the logits, {TITLES[support]}", loc="left", fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens, by the teacher's probability", fontsize=9)
    figure.savefig(Path(__file__).with_name("loss_supports.png"), dpi=110)


if __name__ == "__main__":
    main()
