"""Load the exported student with transformers and compare it with what NeMo measured.

The held-out loss must be that of `evaluate_gpt_sft_kd.py` in float32, from the same tokens, and the
greedy completions those of `complete.py`. Writes a JSON file:

    {"model": directory, "sft_loss": …, "evaluated": …, "same_completions": …, "completions": …}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import track

from nemo_kd.cli.failures import reported
from nemo_kd.outputs import is_json_with, refuse_foreign, refuse_inputs
from nemo_kd.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOUND = 1e-4  # nats per token


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, store: Store) -> float:
    """Return the mean cross-entropy of a store's answer tokens, in nats per token."""
    total, count = 0.0, 0
    for sample in track(store, "held-out loss in transformers"):
        ids = torch.from_numpy(sample.input_ids).long()
        answers = torch.from_numpy(sample.loss_mask[1:]).bool()
        logits = model(ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")
        total += float(losses[answers].double().sum())
        count += int(answers.sum())
    return total / count


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int
) -> str:
    """Return the greedy completion of at most `tokens` tokens, without the end of the sequence."""
    given = tokenizer(prompt, return_tensors="pt").input_ids
    ids = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(ids[0, given.size(1) :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def compare(
    directory: Path, store: Store, evaluated: float, made: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of the JSON file; `made` is that of `complete.py`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32, **local)
    model = model.eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, **local)
    same = [
        complete(model, tokenizer, row["prompt"], made["tokens"]) == row["completions"]["kd"]
        for row in track(made["samples"], "completions in transformers")
    ]
    return {
        "model": str(directory),
        "sft_loss": held_out_loss(model, store),
        "evaluated": evaluated,
        "same_completions": sum(same),
        "completions": len(same),
    }


def main(
    model: Annotated[Path, typer.Argument(help="the exported student")],
    store: Annotated[Path, typer.Option(help="held-out store")],
    evaluation: Annotated[Path, typer.Option(help="result of evaluate_gpt_sft_kd.py, float32")],
    completions: Annotated[Path, typer.Option(help="result of complete.py")],
    output: Annotated[Path, typer.Option(help="JSON file to write")],
) -> None:
    """Compare the exported student in transformers with NeMo's figures; stop if they differ."""
    refuse_inputs([output], [model, store, evaluation, completions])
    refuse_foreign(output, "a comparison of this script", is_json_with("sft_loss", "evaluated"))
    evaluated = json.loads(evaluation.read_text(encoding="utf-8"))["heldout/sft_loss"]
    found = compare(
        model, Store(store), evaluated, json.loads(completions.read_text(encoding="utf-8"))
    )
    if not abs(found["sft_loss"] - evaluated) <= BOUND:
        sys.exit(
            f"error: {model} has a held-out loss of {found['sft_loss']:.5f} in transformers and "
            f"of {evaluated:.5f} in NeMo; expected at most {BOUND} between them"
        )
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with reported():
        typer.run(main)
