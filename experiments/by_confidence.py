"""Where a student is good: its cross-entropy by the probability that the teacher gives the label.

    python experiments/by_confidence.py model_hf outputs/store --output=confidence.json

The answer tokens of the store are divided by the teacher's probability of the label, which is 0 if
the label is not among the K stored ids. A class has the probabilities from its bound to the next:

    {"from": [0, 0.1, …], "tokens": [53, …], "sft_loss": [5.9, …], "right": [0.04, …]}

`right` is the fraction of labels that are the student's most probable token; the loss is in nats.
Classes without a token have null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from steps import write_json
from transformers import AutoModelForCausalLM

from nemo_kd.store import Sample, Store

FROM = (0.0, 0.1, 0.5, 0.9, 0.99)


def label_probability(sample: Sample) -> NDArray[np.float64]:
    """The teacher's probability of the label of each answer token [A]."""
    labels = sample.input_ids[sample.answer_positions(), None]
    p = np.exp(sample.topk.logits.astype(np.float64) - sample.topk.logsumexp[:, :1])
    found: NDArray[np.float64] = (p * (sample.topk.ids == labels)).sum(axis=1)
    return found


@torch.no_grad()
def student_losses(
    model: Any, sample: Sample, vocab_size: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Cross-entropy of each answer token [A], and whether its label is the most probable one."""
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))
    positions = torch.from_numpy(sample.answer_positions())
    logits = model(ids[None]).logits[0, positions - 1, :vocab_size].float()
    labels = ids[positions]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses.double().numpy(), (logits.argmax(-1) == labels).numpy()


def classes(
    p: NDArray[np.float64], losses: NDArray[np.float64], right: NDArray[np.bool_]
) -> dict[str, Any]:
    """The content of the file."""
    of_token = np.searchsorted(FROM, p, side="right") - 1
    tokens = np.bincount(of_token, minlength=len(FROM))

    def means(values: NDArray[Any]) -> list[float | None]:
        sums = np.bincount(of_token, values, len(FROM))
        return [round(s / n, 5) if n else None for s, n in zip(sums, tokens.tolist(), strict=True)]

    return {
        "from": list(FROM),
        "tokens": tokens.tolist(),
        "sft_loss": means(losses),
        "right": means(right),
    }


app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory of the student")],
    store: Annotated[Path, typer.Argument(help="the teacher's store of held-out data")],
    output: Annotated[Path, typer.Option(help="the file to write")],
) -> None:
    opened = Store(store)
    student = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    p = np.concatenate([label_probability(sample) for sample in opened])
    found = [student_losses(student, sample, opened.spec.vocab_size) for sample in opened]
    losses, right = (np.concatenate(each) for each in zip(*found, strict=True))
    write_json(output, classes(p, losses, right))


if __name__ == "__main__":
    app()
