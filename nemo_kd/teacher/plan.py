"""Estimate the disk space, time and GPU memory that a dump needs.

disk    = answer tokens * bytes of the profile + tokens * 5 + samples * (36 + 20 per field)
time    = 2 * parameters * tokens / (working GPUs * FLOP/s * utilisation)
working = min(GPUs / (TP * PP), shards) * TP * PP, because a teacher dumps whole shards
memory  = parameters * 2 / (TP * PP) + logits of the rows at the LM head + activations
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.layout import ROW_ITEM, field_dtypes
from nemo_kd.store.segments import INDEX_BYTES
from nemo_kd.store.spec import StoreSpec

TOKEN_BYTES = 4 + 1  # tokens and loss_mask
IDX_BYTES = 4 + 8 + 8  # length, offset and document of a sample in each .idx
JSONL_BYTES_PER_LOGIT = 25  # a logit and its id in NeMo-Aligner's JSONL
VARIABLE = ("sampled", "top_p")  # profiles whose number of ids varies between tokens
# K draws have about K^0.68 distinct ids: fitted to a mean Σ_v min(1, K p(v)) of 4.9, 12.4, 23.1,
# 43.8 at K = 10, 40, 100, 255 (SmolLM2-135M on Python). On English prose the exponent is 0.80.
DISTINCT_EXPONENT = 0.68
WIDTH_TO_DEPTH = 128  # of a typical transformer: parameters = 12 * width^3 / 128
ACTIVATIONS = 16  # activation values per token and unit of width, in a forward pass


@dataclass(frozen=True)
class Workload:
    """Data, teacher and hardware of a dump."""

    answer_tokens: float
    total_tokens: float
    """Number of tokens in prompts and answers, all of which the teacher processes."""
    samples: float
    teacher_parameters: float
    gpus: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    gpu_tflops: float = 989.0
    """Dense bf16 peak of one GPU in TFLOP/s; 989 is an H100 SXM."""
    utilisation: float = 0.35
    """Fraction of the peak that a forward pass achieves."""
    gpu_memory_gib: float = 80.0
    micro_batch_tokens: int = 8 * 2048
    rows_per_lm_head: int = 256

    def __post_init__(self) -> None:
        numbers = asdict(self)
        bad = [f"{name}={value}" for name, value in numbers.items() if not 0 < value < math.inf]
        if bad:
            raise StoreError(f"a plan needs finite numbers above 0, not {', '.join(bad)}")
        if self.utilisation > 1:
            raise StoreError(
                f"utilisation={self.utilisation}: expected a fraction of the peak, at most 1"
            )
        if self.gpus % (self.tensor_parallel * self.pipeline_parallel):
            raise StoreError(
                f"{self.gpus} GPUs are not a multiple of tensor × pipeline parallel size = "
                f"{self.tensor_parallel * self.pipeline_parallel}"
            )
        if self.total_tokens < self.answer_tokens:
            raise StoreError(
                f"{self.total_tokens:.0f} tokens in total are fewer than the "
                f"{self.answer_tokens:.0f} answer tokens"
            )


@dataclass(frozen=True)
class Plan:
    """Estimated disk space, time and GPU memory of a dump."""

    bytes_per_answer_token: float
    """Encoded size of the top-K per answer token, excluding tokens and indices."""
    ids_per_token: float
    ids_from: str
    """Origin of `ids_per_token`. `profile`: always K; `kept`: as given; `estimate`: distinct ids of
    K draws; `most`: the upper bound K."""
    disk_bytes: float
    bin_bytes: float
    """The part of `disk_bytes` in `.bin` files: all but the indices."""
    jsonl_bytes: float
    """The size of the same data in NeMo-Aligner's JSONL, for comparison."""
    dump_seconds: float
    gpu_hours: float
    """Of the working GPUs."""
    idle_gpus: int
    """GPUs of teachers for which there is no shard."""
    weights_bytes_per_gpu: float
    other_bytes_per_gpu: float
    """Memory for logits and activations."""
    fits: bool
    """Whether weights, logits and activations fit into 90 % of a GPU's memory."""
    smallest_model_parallel: int | None
    """The smallest number of GPUs that can hold one copy of the teacher.

    None if no number does with this tensor parallel size, because logits and activations alone do
    not fit.
    """

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(spec: StoreSpec, work: Workload, kept: float | None = None) -> Plan:
    """Estimate the cost of a dump.

    `kept` is the mean number of ids per token for `top_p` or `sampled`; None estimates it.
    """
    codec = codec_of(spec)
    ids, ids_from = _ids_per_token(spec, kept)
    each = codec.bytes_per_token(ids)
    tokens = work.total_tokens * TOKEN_BYTES
    values = work.answer_tokens * each + tokens + work.samples * ROW_ITEM * 8
    indices = work.samples * (IDX_BYTES * len(field_dtypes(codec)) + INDEX_BYTES)
    seconds = 2 * work.teacher_parameters * work.total_tokens
    parallel = work.tensor_parallel * work.pipeline_parallel
    shards = math.ceil(work.samples / spec.rows_per_shard)
    working = min(work.gpus // parallel, shards) * parallel
    seconds /= working * work.gpu_tflops * 1e12 * work.utilisation
    weights = 2 * work.teacher_parameters
    other = _other_bytes(spec, work)
    room = 0.9 * work.gpu_memory_gib * 2**30
    return Plan(
        bytes_per_answer_token=each,
        ids_per_token=ids,
        ids_from=ids_from,
        disk_bytes=values + indices,
        bin_bytes=values,
        jsonl_bytes=work.total_tokens * spec.top_k * JSONL_BYTES_PER_LOGIT,
        dump_seconds=seconds,
        gpu_hours=seconds * working / 3600,
        idle_gpus=work.gpus - working,
        weights_bytes_per_gpu=weights / parallel,
        other_bytes_per_gpu=other,
        fits=weights / parallel + other <= room,
        smallest_model_parallel=max(1, -int(-weights // (room - other))) if room > other else None,
    )


def _ids_per_token(spec: StoreSpec, kept: float | None) -> tuple[float, str]:
    """Return `Plan.ids_per_token` and `Plan.ids_from`."""
    if spec.profile not in VARIABLE:
        if kept is not None:
            raise StoreError(f"profile {spec.profile} keeps top_k ids at every token, not {kept}")
        return spec.top_k, "profile"
    if kept is not None:
        if not 1 <= kept <= spec.top_k:
            raise StoreError(f"kept must be from 1 to top_k={spec.top_k}, not {kept}")
        return kept, "kept"
    if spec.profile == "sampled":
        return min(spec.top_k**DISTINCT_EXPONENT, spec.vocab_size), "estimate"
    return spec.top_k, "most"


def _other_bytes(spec: StoreSpec, work: Workload) -> float:
    """Return the bytes per GPU of the LM head's logits and of one layer's activations.

    Logits are counted in bf16 and in float32, activations in bf16.
    """
    logits = work.rows_per_lm_head * spec.vocab_size * (2 + 4)
    width = (work.teacher_parameters * WIDTH_TO_DEPTH / 12) ** (1 / 3)
    activations = work.micro_batch_tokens * width * ACTIVATIONS * 2
    return float((logits + activations) / work.tensor_parallel)
