"""A dump of a Llama with random weights, against the model's bare forward pass.

The bare pass computes logits at every position, in the dump's micro-batches. The dump adds to the
layers: LM head and top-K at the answer tokens, the copy to the host, and writing a store; rows are
tokens already. Half of each row is its answer, as is usual in SFT, and then all of it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import megatron
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Row, reason, seconds_in_turn

ROUNDS = 5
LM_HEAD_ROWS = 256
"""The default of `rows_per_lm_head`."""
Forward = Callable[..., Any]


def rows(sizes: Sizes) -> Iterator[Row]:
    for name, make in (("mcore/", of_megatron), ("hf/", of_transformers)):
        try:
            yield from compared(name, make, sizes)
        except Exception as error:  # a package that is missing
            yield {"what": name, "not run": reason(error)}
        torch.cuda.empty_cache()


def compared(name: str, make: Any, sizes: Sizes) -> Iterator[Row]:
    from nemo_kd.store import StoreSpec

    spec = StoreSpec(top_k=sizes.k, vocab_size=sizes.model["vocab_size"])
    bare, forward = make(sizes, spec)
    for share in (0.5, 1.0):
        given = sft_rows(sizes, share)
        with tempfile.TemporaryDirectory() as directory:

            def dump(given: Any = given, directory: str = directory) -> None:
                write(Path(directory) / "store", spec, forward, given, sizes)

            steps = {"forward": lambda given=given: bare(given), "dump": dump}
            for step in steps.values():
                step()
            seconds = seconds_in_turn(steps, ROUNDS, sizes.device)
        tokens = sizes.rows * sizes.tokens
        yield {
            "what": f"{name}, {share:.0%} answer tokens",
            "bare forward, tokens/s": round(tokens / seconds["forward"]),
            "dump, tokens/s": round(tokens / seconds["dump"]),
            "dump / forward": round(seconds["dump"] / seconds["forward"], 3),
        }


def sft_rows(sizes: Sizes, share: float) -> list[Any]:
    from nemo_kd.sft.rows import Row as SFTRow

    generator = np.random.default_rng(0)
    mask = np.zeros(sizes.tokens + 1, np.uint8)
    mask[-int(share * sizes.tokens) :] = 1
    size = (sizes.rows, sizes.tokens + 1)
    ids = generator.integers(sizes.model["vocab_size"], size=size, dtype=np.int32)
    return [SFTRow(number, row, mask) for number, row in enumerate(ids)]


def write(store: Path, spec: Any, forward: Forward, given: list[Any], sizes: Sizes) -> None:
    """Write a store of the rows, as a dump does shard by shard."""
    from nemo_kd.store import StoreWriter
    from nemo_kd.teacher.forward import sample_of

    shutil.rmtree(store, ignore_errors=True)
    writer = StoreWriter(store, spec)
    with writer.shard(0) as shard:
        for start in range(0, len(given), sizes.sequences):
            part = given[start : start + sizes.sequences]
            for row, topk in zip(part, forward(part, sizes.sequences), strict=True):
                shard.add(sample_of(row, topk))
    writer.finish(1)


def of_megatron(sizes: Sizes, spec: Any) -> tuple[Forward, Forward]:
    megatron.start(sizes.device)
    from nemo_kd.mcore.teacher import TopKForward, forward_only
    from nemo_kd.teacher.forward import inputs_of
    from nemo_kd.teacher.layout import Layout

    model = megatron.llama(sizes).eval()
    device = torch.device(sizes.device)
    positions = torch.arange(sizes.tokens, device=device).expand(sizes.sequences, -1)

    def step(iterator: Iterator[Any], model: Any) -> tuple[Any, Any]:
        output = model(
            input_ids=inputs_of(next(iterator), sizes.tokens).to(device),
            position_ids=positions,
            attention_mask=None,
            labels=None,
        )
        return output, lambda logits, non_loss_data: None

    @torch.no_grad()
    def bare(given: list[Any]) -> None:
        size = sizes.sequences
        for start in range(0, len(given), size):
            batch = [given[start : start + size]]
            forward_only(model, step, batch, length=sizes.tokens, micro_batch_size=size)

    return bare, TopKForward(model, spec, Layout(device=device), LM_HEAD_ROWS)


def of_transformers(sizes: Sizes, spec: Any) -> tuple[Forward, Forward]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_kd.hf.teacher import HFForward, HFTeacher
    from nemo_kd.teacher.forward import inputs_of
    from nemo_kd.teacher.layout import Layout

    config = LlamaConfig(
        **sizes.model, tie_word_embeddings=True, max_position_embeddings=sizes.tokens
    )
    with torch.device(sizes.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)

    @torch.no_grad()
    def bare(given: list[Any]) -> None:
        for start in range(0, len(given), sizes.sequences):
            part = given[start : start + sizes.sequences]
            model(input_ids=inputs_of(part, sizes.tokens).to(model.device), use_cache=False)

    no_tokenizer: Any = None  # rows are tokens already
    layout = Layout(device=torch.device(sizes.device))
    teacher = HFTeacher(model, no_tokenizer, layout=layout)
    return bare, HFForward(teacher, spec, LM_HEAD_ROWS)
