"""Train a Llama of Megatron-core with random weights in bf16: SFT, KD + SFT, and KD + SFT fused.

All three are steps of one model with Megatron's schedule, gradients in float32 and Adam; every
token is an answer token. Layers are TransformerEngine's where it is installed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import megatron
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Row, Step, host_waits, peak_bytes, reason, seconds_in_turn

OURS = str(Path(__file__).parents[2] / "nemo_kd")
SFT, KD, FUSED = "SFT, Megatron's cross-entropy", "KD + SFT", "KD + SFT, fused head"
ROUNDS = 3
"""Times that `Sizes.steps` steps of each kind are run."""


def rows(sizes: Sizes) -> Iterator[Row]:
    megatron.start(sizes.device)
    yield from compared(sizes)
    yield graphed(sizes)


def compared(sizes: Sizes) -> Iterator[Row]:
    trained = Training(sizes)
    step = trained.steps()
    for each in step.values():  # compiles, and makes the optimizer's state
        each()
    seconds = seconds_in_turn(
        {name: partial(several, each, sizes.steps) for name, each in step.items()},
        ROUNDS,
        sizes.device,
    )
    for name, each in step.items():
        waits = host_waits(trained.passes(name), sizes.device)
        yield {
            "what": name,
            "s per step": round(seconds[name] / sizes.steps, 4),
            "of SFT's": round(seconds[name] / seconds[SFT], 3),
            "peak GB beyond weights and optimizer": round(peak_bytes(each, sizes.device) / 1e9, 2),
            "host waits in forward + backward": len(waits),
            "of them in nemo_kd": ", ".join(sorted({w for w in waits if w.startswith(OURS)})),
        }


def several(step: Step, times: int) -> None:
    for _ in range(times):
        step()


def graphed(sizes: Sizes) -> Row:
    """KD + SFT with Megatron's CUDA graphs of each layer."""
    row: Row = {"what": f"{KD}, CUDA graphs of the layers"}
    if sizes.device == "cpu":
        return row | {"not run": "CUDA graphs need a GPU"}
    gc.collect()  # the other model
    torch.cuda.empty_cache()
    try:
        from megatron.core import tensor_parallel
        from megatron.core.transformer import TransformerConfig

        tensor_parallel.get_cuda_rng_tracker().reset()
        tensor_parallel.random.initialize_rng_tracker(use_cudagraphable_rng=True, force_reset=True)
        tensor_parallel.model_parallel_cuda_manual_seed(1234, use_cudagraphable_rng=True)
        newer = "cuda_graph_impl" in {one.name for one in fields(TransformerConfig)}
        on: dict[str, Any] = {"cuda_graph_impl": "local"} if newer else {"enable_cuda_graph": True}
        step = Training(sizes, **on).steps()[KD]
        several(step, 5)  # captures after three
        seconds = seconds_in_turn({KD: partial(several, step, sizes.steps)}, ROUNDS, sizes.device)
        return row | {"s per step": round(seconds[KD] / sizes.steps, 4)}
    except Exception as error:  # a version of Megatron that lacks it, or cannot with these layers
        return row | {"not run": reason(error)}


class Training:
    """A model, its optimizer, and one micro-batch on the device that all steps use."""

    def __init__(self, sizes: Sizes, **changes: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel as DDP
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from nemo_kd.loss import KDConfig

        self.sizes, self.kd = sizes, KDConfig()
        gpt = megatron.llama(
            sizes,
            calculate_per_token_loss=True,
            finalize_model_grads_func=finalize_model_grads,
            **changes,
        )
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True
        )
        self.model = DDP(gpt.config, ddp, gpt)
        config = OptimizerConfig(
            lr=1e-5,
            bf16=True,
            params_dtype=torch.bfloat16,
            clip_grad=1.0,
            use_distributed_optimizer=True,
        )
        self.optimizer = get_megatron_optimizer(config, [self.model])
        self.batch = micro_batch(sizes)

    def steps(self) -> dict[str, Step]:
        """Complete steps, by name."""
        return {name: partial(self._step, self.passes(name)) for name in (SFT, KD, FUSED)}

    def _step(self, passes: Step) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        passes()
        self.optimizer.step()

    def passes(self, name: str) -> Step:
        """Forward and backward of one micro-batch."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from nemo_kd.mcore import kd_forward_step

        forward: dict[str, Callable[..., Any]] = {
            SFT: self._sft,
            KD: kd_forward_step(self.kd, self.sizes.model["vocab_size"]),
            FUSED: self._fused,
        }
        return partial(
            get_forward_backward_func(),
            forward_step_func=forward[name],
            data_iterator=repeat(self.batch),
            model=self.model,
            num_microbatches=1,
            seq_length=self.sizes.tokens,
            micro_batch_size=self.sizes.sequences,
            forward_only=False,
        )

    def _sft(self, iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Tensor, Any]:
        from nemo_kd.mcore.training import model_inputs

        batch = next(iterator)
        return model(**model_inputs(batch), labels=batch["labels"]), self._sum

    def _fused(self, iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Tensor, Any]:
        from nemo_kd.loss import linear_sft_kd_loss
        from nemo_kd.mcore.lm_head import gpt_module, split_lm_head
        from nemo_kd.mcore.training import model_inputs

        batch, gpt = next(iterator), gpt_module(model)
        with split_lm_head(gpt):
            hidden = model(**model_inputs(batch))  # [S, B, H]
        loss = linear_sft_kd_loss(
            hidden,
            gpt.shared_embedding_or_output_weight(),
            batch["labels"].t(),
            batch["answers"].topk,
            self.kd,
            positions=batch["answers"].positions,
            equal_gradients=True,
        )
        return loss.loss, self._sum

    def _sum(self, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = losses.float().sum()
        number = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
        return total, number, {"loss": total.detach()}


def micro_batch(sizes: Sizes) -> dict[str, Any]:
    """As `nemo_kd.mcore.StoreBatches` gives it, of random tokens and a random teacher."""
    from benchmarks.gpu.candidates import inputs
    from nemo_kd.data import AnswerTokens

    shape, device = (sizes.sequences, sizes.tokens), sizes.device
    number, vocabulary = sizes.sequences * sizes.tokens, sizes.model["vocab_size"]
    labels, teacher = inputs(number, vocabulary, sizes.k, device)
    return {
        "tokens": torch.randint(vocabulary, shape, device=device),
        "labels": labels.view(shape),
        "loss_mask": torch.ones(shape, device=device),
        "position_ids": torch.arange(sizes.tokens, device=device).expand(shape),
        "answers": AnswerTokens(torch.arange(number, device=device), teacher),
        "vocab_size": vocabulary,
    }
