"""Every family of checkpoints in Megatron-core beside transformers; run by torchrun.

Writes `parity.json`: layout → model → largest difference of the logits, and the largest logit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nemo_kd.mcore import cpu

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from nemo_kd.checkpoints import open_checkpoint  # noqa: E402
from nemo_kd.checkpoints.tensors import HuggingFaceTensors  # noqa: E402
from nemo_kd.mcore.gpt import build, settings_of  # noqa: E402
from nemo_kd.mcore.weights import load_weights  # noqa: E402
from tests.checkpoints import models  # noqa: E402

NAMES = [*models.MODELS, *models.FAMILIES, *models.ROPES]
# Layout → tensor, pipeline and virtual pipeline size. Two layers have no virtual pipeline.
LAYOUTS = {"tp2sp": (2, 1, 1), "pp2": (1, 2, 1), "vpp2": (1, 2, 2)}
LENGTH = 64  # a multiple of the tensor-parallel size


@torch.no_grad()
def logits(chunks: list[Any], ids: torch.Tensor) -> torch.Tensor | None:
    """`[S, V padded]` on the last stage; None on the others."""

    def step(_: Iterator[Any], model: Any) -> Any:
        positions = torch.arange(ids.shape[1])[None]
        output = model(ids, positions, attention_mask=None)
        gather = tensor_parallel.gather_from_tensor_model_parallel_region
        return output, lambda out, **_: gather(out)[0]

    # A virtual pipeline needs a micro-batch for each stage, and an iterator for each chunk.
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter([None, None]) for _ in chunks],
        model=chunks,
        num_microbatches=2,
        seq_length=ids.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return results[0] if results else None


def compare(name: str, layout: str, directory: Path) -> tuple[float, float] | None:
    model = models.llama(name) if name in models.MODELS else models.family(name)
    virtual = LAYOUTS[layout][2]
    if model.config.num_hidden_layers % (2 * virtual):
        return None
    checkpoint = open_checkpoint(models.save(model, directory / name))
    ids = models.tokenizer()(models.TEXT[:400], return_tensors="pt").input_ids[:, :LENGTH]
    chunks = build(
        settings_of(checkpoint.model), virtual=virtual, sequence_parallel=layout == "tp2sp"
    )
    load_weights(chunks, HuggingFaceTensors(checkpoint))
    ours = logits([chunk.eval() for chunk in chunks], ids)
    if ours is None:
        return None
    with torch.no_grad():
        theirs = model(ids).logits[0]
    return float((ours[:, : theirs.shape[1]] - theirs).abs().max()), float(theirs.abs().max())


def main(output: Path) -> None:
    torch.distributed.init_process_group("gloo")
    report: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for layout, (tensor, pipeline, virtual) in LAYOUTS.items():
            parallel_state.initialize_model_parallel(
                tensor, pipeline, virtual if virtual > 1 else None
            )
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            for name in NAMES:
                found = compare(name, layout, Path(directory))
                if found is not None:
                    report.setdefault(layout, {})[name] = found
            parallel_state.destroy_model_parallel()
    if torch.distributed.get_rank() == 1:  # of the last stage
        output.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
