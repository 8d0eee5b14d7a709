"""Megatron-core's loop on every kind of batch: `python … TINY STORE HELDOUT OUT.json`.

The student is a small GPTModel of random weights, dense or a mixture of experts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from nemo_kd.mcore import cpu

cpu.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.distributed.finalize_model_grads import finalize_model_grads  # noqa: E402
from megatron.core.models.mamba import MambaModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.ssm import mamba_block  # noqa: E402
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules  # noqa: E402
from megatron.core.ssm.mlp_layer import MLPLayer  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
)
from nemo.collections.common.tokenizers.sentencepiece_tokenizer import (  # noqa: E402
    SentencePieceTokenizer,
)

from nemo_kd.errors import NemoKDError  # noqa: E402
from nemo_kd.loss import KDConfig, KDSchedule  # noqa: E402
from nemo_kd.mcore import (  # noqa: E402
    EvaluationBatches,
    KDDataset,
    MetricSums,
    Source,
    StoreBatches,
    kd_forward_step,
)
from nemo_kd.mcore.training import model_inputs  # noqa: E402
from nemo_kd.sft.config import RowConfig  # noqa: E402
from nemo_kd.sft.files import open_files  # noqa: E402
from nemo_kd.sft.reader import Model, open_rows  # noqa: E402
from nemo_kd.sft.rows import SFTRows  # noqa: E402
from nemo_kd.store import Store  # noqa: E402
from tests.mcore.small_gpt import config_of  # noqa: E402
from tests.mcore.small_gpt import model as model_of  # noqa: E402
from tests.store.samples import sample, spec, write  # noqa: E402

LENGTH, BATCH = 127, 4
Report = dict[str, float]


def student(**changes: Any) -> torch.nn.Module:
    config = config_of(calculate_per_token_loss=True, **changes)
    return model_of(config, 504, LENGTH, parallel_output=True)


def hybrid() -> torch.nn.Module:
    """Two layers of attention and two of MLP: Mamba's own layers need its CUDA kernels."""
    config = config_of(4, calculate_per_token_loss=True)
    parts = cpu.local_layer_spec(config).submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm,
        self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda
    )
    layers = MambaStackSubmodules(
        attention_layer=ModuleSpec(TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(MLPLayer, submodules=mlp),
    )
    mamba_block.TENorm = WrappedTorchNorm  # TransformerEngine's norm has no other way in
    torch.manual_seed(0)
    return MambaModel(
        config,
        ModuleSpec(MambaStack, submodules=layers),
        vocab_size=504,
        max_sequence_length=LENGTH,
        hybrid_override_pattern="*-*-",
        parallel_output=True,
    )


def run(step: Any, batches: Iterable[Any], model: torch.nn.Module, number: int) -> list[Report]:
    """One step of Megatron's schedule: gradients in training; the means of each micro-batch."""
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=number,
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=not model.training,
    )
    return [{name: float(x[0] / x[1]) for name, x in report.items()} for report in reports]


def train(
    model: torch.nn.Module, batches: StoreBatches, config: KDConfig, steps: Iterable[int]
) -> list[Report]:
    """Steps of plain SGD, each with the sums over its micro-batches."""
    found: list[Report] = []
    for number in steps:
        step = kd_forward_step(config, 500, progress=lambda at=number: (at, 6))
        model.zero_grad()
        reports = run(step, batches, model, BATCH // batches.micro_batch_size)
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-1e-3)
        found.append({name: sum(r[name] for r in reports) for name in reports[0]})
    return found


def batches_of(sources: Any, **changes: Any) -> StoreBatches:
    settings = {"seq_length": LENGTH, "micro_batch_size": 1, "global_batch_size": BATCH}
    return StoreBatches(sources, **{**settings, **changes})


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def mixes(store: Store, rows: SFTRows) -> dict[str, Any]:
    """The mean losses of micro-batches of one source each, and the drawn sources."""
    sources = [Source(store, alpha=0.25, weight=3), Source(rows, weight=1)]
    batches = batches_of(sources)
    kinds = [bool((next(batches)["answers"].topk.ids >= 0).any()) for _ in range(40)]
    model = student().eval()
    reports = run(kd_forward_step(KDConfig(alpha=0.9), 500), batches_of(sources), model, 12)
    return {"with_teacher": kinds, "reports": reports}


def packed(store: Store) -> dict[str, Any]:
    """Σ over one epoch of each answer token's loss, in packs and padded."""
    found = {}
    for name, changes in {"packs": {"packed": True, "seq_length": 300}, "padded": {}}.items():
        batches = batches_of(store, global_batch_size=1, **changes)
        model, sums = student().eval(), MetricSums()
        run(kd_forward_step(KDConfig(), 500, sums=sums), batches, model, len(batches.dataset))
        found[name] = {"items": len(batches.dataset), **sums.means()}
    return found


def evaluation(store: Store) -> dict[str, Any]:
    """Means of a validation by Megatron's quotient of sums, and those of `MetricSums`."""
    model, sums = student().eval(), MetricSums()
    totals: dict[str, Any] = {}
    schedule = KDSchedule(alpha=0.9, alpha_end=0.2)
    step = kd_forward_step(schedule, 500, progress=lambda: (0, 6), sums=sums)
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=batches_of(store, global_batch_size=1),
        model=model,
        num_microbatches=len(store),
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=True,
    )
    for report in reports:
        for name, value in report.items():
            totals[name] = totals.get(name, 0) + value.double()
    quotients = {name: float(value[0] / value[1]) for name, value in totals.items()}
    return {"quotients": quotients, "sums": sums.means(), "tokens": float(totals["loss"][1])}


def resumed(store: Store) -> dict[str, Any]:
    """Six steps, and the same in two runs whose second starts from what the first saved."""
    schedule = KDSchedule(alpha=0.9, alpha_end=0.5, schedule="cosine")
    sources = [Source(store, weight=1.0), Source(store, alpha=0.1, weight=2.0)]
    model, batches = student(), batches_of(sources, seed=3)
    through = train(model, batches, schedule, range(6))
    first, batches = student(), batches_of(sources, seed=3)
    parts = train(first, batches, schedule, range(2))
    saved = json.loads(json.dumps(batches.state_dict()))
    second, again = student(), batches_of(sources, seed=3)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(saved)
    parts += train(second, again, schedule, range(2, 6))
    refusal = ""
    try:
        batches_of(sources, seed=4).load_state_dict(saved)
    except NemoKDError as error:
        refusal = str(error)
    same = all(map(torch.equal, model.parameters(), second.parameters()))
    return {"through": through, "parts": parts, "same_weights": same, "refusal": refusal}


def mixture_of_experts(store: Store) -> dict[str, Any]:
    """Gradients at alpha 0 and those of Megatron's own cross-entropy, with an auxiliary loss."""
    experts: dict[str, Any] = {"num_moe_experts": 4, "moe_router_topk": 2}
    experts |= {"moe_aux_loss_coeff": 0.5, "moe_router_load_balancing_type": "aux_loss"}
    found: dict[str, Any] = {}
    gradients = {}
    for name, step, aux in (
        ("ours", kd_forward_step(KDConfig(alpha=0.0, count_padding=True), 500), 0.5),
        ("megatron", megatrons_step, 0.5),
        ("without", kd_forward_step(KDConfig(alpha=0.0, count_padding=True), 500), 0.0),
    ):
        model = student(**{**experts, "moe_aux_loss_coeff": aux})
        run(step, batches_of(store), model, BATCH)
        gradients[name] = gradient(model)
    norm = gradients["megatron"].norm()
    for name in ("ours", "without"):
        found[name] = float((gradients[name] - gradients["megatron"]).norm() / norm)
    model = student(**experts)
    found["losses"] = train(model, batches_of(store), KDConfig(), range(6))
    return found


def hybrid_student(store: Store) -> dict[str, Any]:
    """Gradients at alpha 0 and those of Megatron's own cross-entropy; losses of a training."""
    gradients = []
    for step in (kd_forward_step(KDConfig(alpha=0.0, count_padding=True), 500), megatrons_step):
        model = hybrid()
        run(step, batches_of(store), model, BATCH)
        gradients.append(gradient(model))
    apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    return {"apart": apart, "losses": train(hybrid(), batches_of(store), KDConfig(), range(6))}


def megatrons_step(
    iterator: Iterator[Any], model: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """What Megatron-LM's own `forward_step` does: cross-entropy over the loss mask."""
    batch = next(iterator)
    losses = model(**model_inputs(batch), labels=batch["labels"])

    def loss(output: torch.Tensor) -> Any:
        total, number = (output * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
        return total, number, {"loss": torch.stack([total.detach(), number.float()])}

    return losses, loss


def empty_micro_batches(directory: Path) -> dict[str, Any]:
    """Norm of the gradient of one sample with answers among three without, in two splits."""
    of = spec(vocab_size=500, rows_per_shard=4)
    samples = [sample(0, of, answers=4), *(sample(row, of, answers=0) for row in (1, 2, 3))]
    store = Store(write(directory, of, samples))
    found = {}
    for size in (1, 4):
        config = DistributedDataParallelConfig()
        plain: Any = student(finalize_model_grads_func=finalize_model_grads)
        model = DistributedDataParallel(plain.config, config, plain)
        get_forward_backward_func()(
            forward_step_func=kd_forward_step(KDConfig(), 500),
            data_iterator=batches_of(store, micro_batch_size=size),
            model=model,
            num_microbatches=BATCH // size,
            seq_length=LENGTH,
            micro_batch_size=size,
            forward_only=False,
        )
        found[str(size)] = float(sum(p.main_grad.norm() ** 2 for p in plain.parameters()) ** 0.5)
    return found


def long_pack(directory: Path) -> list[list[int]]:
    """The boundaries of the packs of samples of 16 and 1 inputs, in packs of 16."""
    of = spec(vocab_size=500, rows_per_shard=4)
    samples = [sample(0, of, answers=14), sample(1, of, answers=1, prompt=1)]
    batches = batches_of(
        Store(write(directory, of, samples)), packed=True, seq_length=16, global_batch_size=2
    )
    return [next(batches)["cu_seqlens"].tolist() for _ in range(2)]


def whole_evaluation(store: Store) -> dict[str, Any]:
    """Tokens and loss of two evaluations in batches of 4, and of one in batches of 1."""
    found = {}
    for size, rounds in ((4, 2), (1, 1)):
        dataset = KDDataset(store, seq_length=LENGTH, shuffle=False)
        batches = EvaluationBatches(dataset, micro_batch_size=1, global_batch_size=size)
        sums = MetricSums()
        step = kd_forward_step(KDConfig(), 500, sums=sums)
        model = student().eval()
        tokens = []
        for _ in range(rounds):
            sums.reset()
            run(step, batches, model, batches.steps * size)
            assert sums.sums is not None
            tokens.append(float(sums.sums[1, 0]))
        found[str(size)] = {"tokens": tokens, **sums.means()}
    return found


def last_temperature(store: Store) -> dict[str, Report]:
    """Means of an evaluation under a schedule that ends at temperature 2, and of one at 2."""
    moving = KDSchedule(support="topk", temperature=1.0, temperature_end=2.0)
    constant = KDConfig(support="topk", temperature=2.0)
    found = {}
    for name, config, temperature in (
        ("moving", moving, 2.0),
        ("constant", constant, 2.0),
        ("unknown", moving, 1.0),
    ):
        batches = batches_of(store, temperature=temperature)
        step = kd_forward_step(config, 500, progress=lambda: (0, 6))
        (found[name],) = run(step, batches, student().eval(), 1)
    return found


def ratio(store: Store) -> list[str]:
    """Errors of positions saved with weights 1 : 2, at 2 : 4 and at 2 : 1."""
    saved = batches_of([Source(store, weight=1), Source(store, weight=2)]).state_dict()
    errors = []
    for weights in ((2, 4), (2, 1)):
        batches = batches_of([Source(store, weight=weight) for weight in weights])
        try:
            batches.load_state_dict(saved)
            errors.append("")
        except NemoKDError as error:
            errors.append(str(error))
    return errors


def one_id(directory: Path) -> Store:
    """A store with one id per token."""
    of = spec(vocab_size=500, top_k=1, rows_per_shard=4)
    return Store(write(directory, of, [sample(row, of, answers=4) for row in range(4)]))


def refusals(store: Store, rows: SFTRows, other: Store, single: Store) -> dict[str, str]:
    wrong: dict[str, Callable[[], Any]] = {
        "batch_of_packs": lambda: next(
            batches_of(store, packed=True, seq_length=300, micro_batch_size=2)
        ),
        "packs_of_rows": lambda: batches_of([Source(store), Source(rows)], packed=True),
        "weights": lambda: batches_of([Source(store, weight=1.0), Source(store)]),
        "alpha_of_rows": lambda: Source(rows, alpha=0.5),
        "alpha": lambda: Source(store, alpha=1.5),
        "alpha_type": lambda: Source(store, alpha=cast(Any, "0.5")),
        "weight_type": lambda: Source(store, weight=cast(Any, [1])),
        "setting_type": lambda: KDConfig(temperature=cast(Any, "2")),
        "one_id": lambda: run(
            kd_forward_step(KDConfig(support="topk"), 500), batches_of(single), student(), BATCH
        ),
        "no_source": lambda: batches_of([]),
        "schedule": lambda: kd_forward_step(KDSchedule(alpha_end=0.5), 500),
        "long_rows": lambda: batches_of([Source(rows)], seq_length=100),
        "temperature": lambda: batches_of(store, temperature=3.0),
        "size": lambda: batches_of(store, micro_batch_size=-1),
        "consumed": lambda: batches_of(store, consumed_samples=-4),
        "type": lambda: batches_of("store"),
        "vocabulary": lambda: run(
            kd_forward_step(KDConfig(), 504), batches_of(store), student(), BATCH
        ),
        "tokenizer": lambda: batches_of([Source(other), Source(rows)]),
    }
    found = {}
    for name, call in wrong.items():
        try:
            call()
        except NemoKDError as error:
            found[name] = str(error)
    return found


def main(tiny: Path, directory: Path, heldout: Path, out: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}.rendezvous", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    store = Store(directory)
    tokenizer = SentencePieceTokenizer(str(tiny / "tokenizer.model"))
    model = Model(tokenizer=tokenizer, max_seq_length=128)
    rows = open_rows(RowConfig(max_seq_length=128), open_files(tiny / "heldout.jsonl"), model)
    result = {
        "mixes": mixes(store, rows),
        "packed": packed(store),
        "evaluation": evaluation(Store(heldout)),
        "resumed": resumed(store),
        "experts": mixture_of_experts(store),
        "hybrid": hybrid_student(store),
        "empty": empty_micro_batches(out.parent / "empty"),
        "long_pack": long_pack(out.parent / "long"),
        "whole_evaluation": whole_evaluation(Store(heldout)),
        "refusals": refusals(
            store, rows, Store(out.parent / "long"), one_id(out.parent / "single")
        ),
        "last_temperature": last_temperature(store),
        "ratio": ratio(store),
    }
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
