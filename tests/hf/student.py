"""A tiny student of transformers, stores for it, and its loss by definition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nemo_kd.loss import KDConfig, reference
from nemo_kd.store import Sample, Store
from nemo_kd.topk import TopK
from tests.store.samples import sample, spec, write

VOCABULARY, COLUMNS = 61, 64  # three columns of the logits are padding
ANSWERS = (4, 1, 7, 2, 5, 3)


def student(columns: int = COLUMNS) -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=columns,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config)


def write_store(directory: Path, answers: Sequence[int] = ANSWERS, **changes: Any) -> Path:
    """Sample i has `answers[i]` answer tokens after a prompt of 2 + i tokens."""
    of = spec(vocab_size=VOCABULARY, temperatures=(1.0, 2.0), **changes)
    samples = [sample(i, of, count, prompt=2 + i) for i, count in enumerate(answers)]
    return write(directory, of, samples)


def expected_losses(model: Any, one: Sample, config: KDConfig) -> Tensor:
    """Loss of each answer token [A], in float64, of the sample alone: no batch, no padding."""
    logits = model.double()(torch.tensor(one.input_ids)[None].long()).logits[0, :, :VOCABULARY]
    answers = [t for t in range(1, len(one.input_ids)) if one.loss_mask[t]]
    column = one.topk.temperatures.index(config.temperature)
    teacher = TopK(
        ids=torch.tensor(one.topk.ids),
        logits=torch.tensor(one.topk.logits),
        logsumexp=torch.tensor(one.topk.logsumexp[:, column]),
        temperatures=(config.temperature,),
    )
    before = torch.tensor([t - 1 for t in answers], dtype=torch.int64)
    labels = torch.tensor([int(one.input_ids[t]) for t in answers], dtype=torch.int64)
    return reference.sft_kd_loss(logits[before], labels, teacher, config)[0]


def expected(
    config: KDConfig, *stores: Path, weights: dict[str, Tensor] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """The mean over all answer tokens of `stores`, and its gradient, in float64."""
    model = student()
    model.load_state_dict(weights or model.state_dict())
    losses = [expected_losses(model, one, config) for path in stores for one in Store(path)]
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_gradients(model: Any, wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The gradients of `model` are `wanted`, but for float32's rounding relative to the largest."""
    for name, parameter in model.named_parameters():
        largest = wanted[name].abs().max()
        assert largest > 0
        assert (parameter.grad - wanted[name]).abs().max() < tolerance * largest, name
