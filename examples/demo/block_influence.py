"""Choose the layers of a pruned student: those with the largest block influence.

    BI_l = 1 - E[cos(h_l, h_{l+1})],  h_l the residual stream before layer l, over tokens

Layers that hardly change the direction of the residual stream are the cheapest to remove
(ShortGPT, arXiv 2403.03853).
Writes a JSON file that `convert_hf_to_nemo.py --keep-layers=@FILE` reads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from nemo_kd.checkpoints import open_checkpoint
from nemo_kd.checkpoints.huggingface import to_transformers
from nemo_kd.cli.failures import reported
from nemo_kd.outputs import is_json_with, refuse_foreign, refuse_inputs

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@torch.no_grad()
def block_influence(model: LlamaForCausalLM, samples: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the BI of each layer [L], float64; `samples` are token ids [1, S]."""
    layers = model.model.layers
    total, tokens = torch.zeros(len(layers), dtype=torch.float64), 0

    def measure(index: int) -> Any:
        # Not hidden_states of transformers: to the last one the final norm is applied.
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], outputs: Any) -> None:
            after = outputs[0] if isinstance(outputs, tuple) else outputs
            cosine = torch.cosine_similarity(inputs[0], after, dim=-1)  # [1, S]
            total[index] += cosine.double().sum()

        return hook

    hooks = [layer.register_forward_hook(measure(i)) for i, layer in enumerate(layers)]
    for ids in samples:
        model(ids)
        tokens += ids.numel()
    for handle in hooks:
        handle.remove()
    return 1 - total / tokens


def most_influential(influence: torch.Tensor, depth: int) -> list[int]:
    """Return the `depth` layers with the largest BI, in the model's order."""
    order: list[int] = influence.argsort(descending=True)[:depth].sort().values.tolist()
    return order


def main(
    source: Annotated[Path, typer.Argument(help="teacher: Hugging Face directory or .gguf file")],
    data: Annotated[Path, typer.Option(help="SFT JSONL to measure on")],
    keep: Annotated[int, typer.Option(help="number of layers of the student")],
    output: Annotated[Path, typer.Option(help="JSON file for the kept layers and all influences")],
    samples: Annotated[int, typer.Option(help="number of rows to measure on")] = 32,
) -> None:
    """Measure SOURCE on a few samples and choose KEEP layers for the student."""
    from transformers import AutoTokenizer

    refuse_inputs([output], [source, data])
    refuse_foreign(output, "the layers that this script chose", is_json_with("kept", "influence"))
    console = Console()
    with console.status(f"reading {source}"), tempfile.TemporaryDirectory() as directory:
        checkpoint = open_checkpoint(source)
        checkpoint.save_tokenizer(directory)
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        model = to_transformers(checkpoint)
    count = checkpoint.model.num_layers
    if not 0 < keep <= count:
        raise typer.BadParameter(f"--keep {keep}: expected 1 to {count}, the teacher's layers")
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:samples]]
    texts = [f"{row['input']} {row['output']}" for row in rows]
    ids = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
    progress = track(ids, "measuring", total=len(texts), console=console)
    influence = block_influence(model, progress)
    kept = most_influential(influence, keep)
    output.parent.mkdir(parents=True, exist_ok=True)
    figures = {"kept": kept, "influence": influence.tolist(), "samples": len(rows)}
    output.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    least = float(influence[kept].min())
    console.print(f"kept layers {','.join(map(str, kept))}: influence {least:.3f} or more")


if __name__ == "__main__":
    with reported():
        typer.run(main)
