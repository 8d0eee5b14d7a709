"""Models in Megatron's `Float16Module`, as training programs have them: `python … DIRECTORY`.

Prints JSON: logits and answers of a bf16 teacher with and without the wrapper; of a student, what
the loss gets, and its results beside those of the loss of the model's output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_kd.mcore import cpu

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

import nemo_kd.mcore.micro_batch as micro_batch  # noqa: E402
from nemo_kd.errors import NemoKDError  # noqa: E402
from nemo_kd.loss import KDConfig  # noqa: E402
from nemo_kd.mcore.dataset import Batch, KDDataset  # noqa: E402
from nemo_kd.mcore.layout import layout  # noqa: E402
from nemo_kd.mcore.teacher import TopKForward  # noqa: E402
from nemo_kd.mcore.training import StepLoss, kd_forward_step, model_inputs  # noqa: E402
from nemo_kd.mcore.writer import MegatronWriter  # noqa: E402
from nemo_kd.sft.rows import Row  # noqa: E402
from nemo_kd.store import Store  # noqa: E402
from nemo_kd.teacher.generation.step import Decoding, Prompt  # noqa: E402
from tests.mcore import small_gpt  # noqa: E402
from tests.store.samples import sample, spec, write  # noqa: E402

VOCABULARY, LENGTH, B = 61, 24, 2
ROWS = 64  # of the embedding
HALF: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16}


def model(tied: bool = False, **changes: Any) -> Any:
    config = small_gpt.config_of(calculate_per_token_loss=True, **changes)
    gpt = small_gpt.model(config, ROWS, LENGTH, share_embeddings_and_output_weights=tied)
    return gpt.to(config.params_dtype)


def teachers(tied: bool) -> dict[str, Any]:
    """Stored logits and generated tokens, of the teacher and of the wrapped one."""
    plain, of = model(tied, **HALF), spec(vocab_size=VOCABULARY)
    wrapped = Float16Module(plain.config, plain)
    rows = [
        Row(n, np.arange(n, n + 9, dtype=np.uint32), np.array([0] * 4 + [1] * 5, dtype=np.uint8))
        for n in range(3)
    ]
    decoding = Decoding(max_new_tokens=5, stop_ids=(VOCABULARY - 1,))
    prompts = [Prompt(n, ids=(n + 1, 3 * n, 5), room=5) for n in range(2)]
    dumps, texts = [], []
    for teacher in (plain, wrapped):
        teacher.eval().requires_grad_(False)
        found = TopKForward(teacher, of, layout(), 16)(rows, 3)
        assert found is not None
        dumps.append(torch.cat([topk.logits for topk in found]).tolist())
        answers = MegatronWriter(teacher, of, layout(), decoding)(prompts)
        assert answers is not None
        texts.append(answers.ids)
    return {"dump": dumps, "answers": texts}


def seen_by_the_loss(batch: Batch) -> dict[str, Any]:
    """dtype, shape and memory of the output layer's logits, and of those that the loss gets."""
    spied: Any = micro_batch
    gpt, found, loss = model(**HALF), {}, spied.sft_kd_loss

    def note(name: str, logits: torch.Tensor) -> None:
        found[name] = [str(logits.dtype), list(logits.shape), logits.stride(), logits.data_ptr()]

    def spy(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        note("loss", logits)
        return loss(logits, *args, **kwargs)

    gpt.output_layer.register_forward_hook(lambda _, given, output: note("layer", output[0]))
    spied.sft_kd_loss = spy
    output, reduce = kd_forward_step(KDConfig(), VOCABULARY)(
        iter([batch]), Float16Module(gpt.config, gpt)
    )
    spied.sft_kd_loss = loss
    total, *_ = reduce(output)
    total.backward()
    return found


Step = Callable[[Any, Any], tuple[Any, Any]]


def from_logits(iterator: Any, student: Any) -> tuple[Any, Any]:
    """The forward step of a program of one's own, with the loss function of a `StepLoss`."""
    batch = next(iterator)
    return student(**model_inputs(batch)), StepLoss(KDConfig(), VOCABULARY)(batch, student)


def planned(iterator: Any, student: Any) -> tuple[Any, Any]:
    """The forward pass later than the step, as a schedule plan of Megatron's runs it."""
    student.build_schedule_plan = lambda **inputs: partial(student, **inputs)
    plan, reduce = kd_forward_step(KDConfig(), VOCABULARY)(
        iterator, student, return_schedule_plan=True
    )
    return plan(), reduce


def losses(step: Step, batch: Batch, training: bool, **changes: Any) -> tuple[Any, torch.Tensor]:
    """(loss, number, report), and the gradient."""
    gpt = model(**changes).train(training)
    student = Float16Module(gpt.config, gpt) if changes else gpt
    with torch.set_grad_enabled(training):
        output, reduce = step(iter([batch]), student)
        total, number, report = reduce(output)
    flat = torch.zeros(1)
    if training:
        total.backward()
        flat = torch.cat([p.grad.flatten() for p in gpt.parameters()]).double()
    assert "compute_language_model_loss" not in vars(gpt)
    numbers = {name: term.tolist() for name, term in report.items()}
    return [float(total), int(number), numbers], flat


def compared(batch: Batch) -> dict[str, Any]:
    """Per case: (loss, number, report) of each step, and how far their gradients are apart."""
    found = {}
    for name, training, changes in (
        ("float32", True, {}),
        ("bf16", True, HALF),
        ("evaluation", False, HALF),
    ):
        own = kd_forward_step(KDConfig(), VOCABULARY)
        (theirs, expected), *ours = [
            losses(step, batch, training, **changes) for step in (from_logits, own, planned)
        ]
        apart = [float((g - expected).norm() / (expected.norm() + 1e-30)) for _, g in ours]
        found[name] = {"expected": theirs, "found": [one for one, _ in ours], "apart": apart}
    return found


def fused_elsewhere(batch: Batch) -> str:
    """The error of a model that computes its loss by itself."""
    gpt = model()
    gpt.forward = lambda **_: torch.zeros(B, LENGTH)
    output, reduce = kd_forward_step(KDConfig(), VOCABULARY)(iter([batch]), gpt)
    try:
        reduce(output)
    except NemoKDError as error:
        return str(error)
    return ""


def main(directory: Path) -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    of = spec(vocab_size=VOCABULARY)
    written = write(directory / "store", of, [sample(n, of, 4 + n, prompt=5) for n in range(4)])
    data = KDDataset(Store(written), seq_length=LENGTH, shuffle=False)
    batch = data.collate_fn([data[n] for n in range(B)])
    result = {
        "untied": teachers(tied=False),
        "tied": teachers(tied=True),
        "seen": seen_by_the_loss(batch),
        "compared": compared(batch),
        "fused_elsewhere": fused_elsewhere(batch),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
