"""Dataclasses for the configuration of a dump (`conf/dump_teacher_topk.yaml`) and of a generation.

`nemo_kd.cli.dump_settings` checks the Hydra configuration and converts it to these dataclasses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from nemo_kd.errors import NemoKDError
from nemo_kd.settings.values import (
    ACCELERATOR,
    DEVICES,
    PATH,
    PRECISION,
    Count,
    Natural,
    PathText,
    number,
    one_of,
    one_or_more,
)
from nemo_kd.sft.config import RowConfig, check_flags
from nemo_kd.store.codecs.sampled import Sampled, seed_of

Kind = Annotated[
    str,
    one_of(
        "nemo",
        "hf",
        "mcore",
        "served",
        hf="huggingface transformers gguf",
        mcore="megatron megatron-core megatron_core megatron-lm bridge",
        served="server vllm sglang openai",
    ),
]
Api = Annotated[str, one_of("vllm", "sglang", vllm="openai")]
ErrorOrDrop = Annotated[str, one_of("error", "drop", drop="skip", error="refuse")]
Profile = Annotated[
    str,
    one_of(
        "plain",
        "compact",
        "top_p",
        "sampled",
        plain="topk full",
        compact="compressed small",
        top_p="nucleus",
        sampled="sample samples sampling draws",
    ),
]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The block `trainer`: processes and precision."""

    devices: Annotated[Any, DEVICES] = 1
    """Processes per node; the YAML files default to as many as torchrun started, or 1."""
    num_nodes: Count = 1
    """Number of nodes."""
    accelerator: Annotated[str, ACCELERATOR] = "gpu"
    """`gpu` or `cpu`; a machine without CUDA uses the CPU in either case."""
    precision: Annotated[Any, PRECISION] = "bf16"
    """`32`, `bf16` or `16`, also in Lightning's other spellings, such as `bf16-mixed`."""

    @property
    def dtype_name(self) -> str:
        """`32`, `bf16` or `16`: the part of `precision` before the dash."""
        return str(self.precision).partition("-")[0]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The block `teacher`: the kind of teacher, and for `served` the inference server."""

    kind: Kind = "nemo"
    """`nemo`: a .nemo checkpoint; `hf`: a Hugging Face directory or .gguf, run by transformers;
    `mcore`: a Megatron-LM checkpoint, a Hugging Face directory or a .nemo, run by Megatron-core
    without NeMo; `served`: a model behind an inference server. All other keys are for `served`,
    except `tokenizer` and `arguments`."""
    url: str | None = None
    """Address of the server, such as `http://127.0.0.1:8000`."""
    api: Api = "vllm"
    """`vllm`: `/v1/completions` with `prompt_logprobs`; `sglang`: `/generate`."""
    model: str | None = None
    """Name of the served model; null: the only one in the server's `/v1/models`."""
    tokenizer: PathText | None = None
    """Directory of the tokenizer, in Hugging Face's format. `served`: rows are tokenized here and
    sent as ids; `mcore`: null takes the checkpoint's own."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """`mcore`: Megatron-LM's arguments of the model that its checkpoint lacks, under their names in
    Megatron-LM's code: `{num_layers: 32}`."""
    concurrency: Count = 32
    """Maximum number of requests in flight, per process."""
    timeout: Annotated[float, number(0, above=True)] = 600.0
    """Seconds within which a request must be answered."""
    retries: Natural = 10
    """Retries of a request after connection errors, time-outs, 408, 429 and 5xx; the waits double
    from 0.5 s to 60 s."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's API key."""

    def __post_init__(self) -> None:
        if self.kind == "served":
            check_url(self.url)
            if self.tokenizer is None:
                raise NemoKDError(
                    "tokenizer must be given with teacher.kind=served: the directory of the served "
                    "model's tokenizer"
                )
        for each in fields(self):
            kinds = {"kind": [self.kind], **KINDS}.get(each.name, ["served"])
            if self.kind not in kinds and getattr(self, each.name) not in (each.default, {}):
                raise NemoKDError(
                    f"{each.name} is for teacher.kind={' or '.join(kinds)}, but teacher.kind is "
                    f"{self.kind}"
                )


KINDS = {"tokenizer": ["served", "mcore"], "arguments": ["mcore"]}
"""Keys of the block `teacher` that are not for `served` only, and the kinds that have them."""


def check_url(url: str | None) -> None:
    """Raise NemoKDError, without repeating the URL, unless it is that of an HTTP server."""
    try:
        parts = urlsplit(url or "")
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise NemoKDError(
            "url must be the server's address with teacher.kind=served, such as "
            "http://127.0.0.1:8000"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise NemoKDError(
            "url must not contain a user, a password or a query: give the key in an environment "
            "variable, and its name as teacher.api_key_env"
        )


@dataclass(frozen=True, kw_only=True)
class TeacherModelConfig:
    """The block `model`: the teacher and its layout, of which only `nemo` and `mcore` have one; a
    NeMo teacher also accepts NeMo's keys."""

    restore_from_path: PathText | None = None
    """Path of the teacher's checkpoint, of the kind `teacher.kind`; none for `served`."""
    tensor_model_parallel_size: Count = 1
    """Number of ranks that each layer is split across."""
    pipeline_model_parallel_size: Count = 1
    """Number of ranks that the layers are distributed over."""
    sequence_parallel: bool = False
    """Megatron's sequence parallelism; needs a tensor-parallel size above 1."""
    micro_batch_size: Count = 8
    """Samples of similar length in one forward pass."""
    megatron_amp_O2: bool = False
    """Hold the weights in `trainer.precision` instead of float32."""
    answer_only_loss: bool = True
    """`false`: store the teacher's top-K for prompt tokens too, not only for answers."""

    def __post_init__(self) -> None:
        check_flags(self)

    @property
    def checkpoint(self) -> Path:
        """`restore_from_path`; NemoKDError if it is not given."""
        if self.restore_from_path is None:
            raise NemoKDError(
                "model.restore_from_path must be given: add model.restore_from_path=VALUE to the "
                "command."
            )
        return Path(self.restore_from_path)


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowConfig):
    """The block `data`: the SFT file and how its rows are tokenized, as in NeMo's SFT."""

    file_path: Annotated[str | list[str], one_or_more(PATH)]
    """The SFT file: JSONL, a JSON array, Parquet, or a directory that `datasets` saved; a glob or
    a list of files are read as one."""
    no_answer: ErrorOrDrop = "error"
    """`drop`: skip rows that have no answer token within `max_seq_length`."""


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """The block `dump`: which logits are stored and how. `StoreSpec` checks the values."""

    top_k: Count = 100
    """Number of logits and ids stored per answer token; for `sampled`, the number of draws."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures at which a log-sum-exp is stored. They must include 1, and training's
    `model.kd.temperature` must be one of them."""
    profile: Profile = "plain"
    """How the logits are encoded: `plain` (404 bytes per answer token at K = 100, or 604 with a
    vocabulary above 65,536), `compact` (about 250), `top_p` (only the ids that hold a given
    mass), `sampled` (random draws, about 24 at K = 40)."""
    profile_options: dict[str, Any] = field(default_factory=dict)
    """Options of the profile: `{p: 0.95}` for `top_p`, `{seed: 0}` for `sampled`."""

    def __post_init__(self) -> None:
        if self.profile == Sampled.name:
            seed_of(self.profile_options)
        if isinstance(self.profile_options.get("p"), bool):
            raise NemoKDError(
                f"profile_options has p={self.profile_options['p']}: expected a number in (0, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class DumpConfig:
    """The configuration of a dump: `nemo-kd dump` or `examples/dump_teacher_topk.py`."""

    trainer: TrainerConfig
    teacher: TeacherConfig
    model: TeacherModelConfig
    data: DataConfig
    dump: TopKConfig
    output_dir: PathText
    """The directory of the store."""
    rows_per_shard: Count = 256
    """Rows per shard, the unit of work and of resuming."""
    segment_bytes: Count | None = None
    """Approximate size of a segment of the finished store; null: 1 GiB, or 1/64 of a larger store,
    at most 16 GiB."""
    max_tokens_per_micro_batch: Count | None = None
    """Limit on rows × longest row of a micro-batch; it makes micro-batches of long rows smaller."""
    rows_per_lm_head: Count = 256
    """Number of answer tokens passed through the LM head at a time."""
    on_bad_row: ErrorOrDrop = "error"
    """`drop`: skip rows that cannot be read or whose logits are NaN."""
    jsonl: bool = False
    """Also write the store's content to `topk.jsonl` in NeMo-Aligner's format."""
    overwrite: bool = False
    """Replace an existing store; it is kept in `.replaced` until the new one is complete."""

    def __post_init__(self) -> None:
        check_flags(self)
        if self.jsonl and self.dump.profile == "sampled":
            raise NemoKDError(
                "jsonl=true with dump.profile=sampled: a JSONL file cannot record that its ids are "
                "draws; set jsonl=false, and convert the store to Parquet if need be"
            )


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The block `generation.filter`: which answers are kept."""

    pattern: str | None = None
    """Regular expression that must match somewhere in the answer."""
    function: str | None = None
    """`module:function`, called with (answer, row of the file); an answer is kept if true."""

    def __post_init__(self) -> None:
        try:
            re.compile("" if self.pattern is None else self.pattern)
        except (re.error, TypeError) as error:  # TypeError: for a number
            raise NemoKDError(
                f"generation.filter.pattern={self.pattern!r} is not a regular expression: {error}"
            ) from error
        if self.function is not None and not all(str(self.function).partition(":")):
            raise NemoKDError(
                f"generation.filter.function={self.function!r}: expected module:function, such as "
                "checks:is_right"
            )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The block `generation`: how answers are generated."""

    max_new_tokens: Count = 512
    """Maximum tokens per answer, including the stop token; prompts are truncated to leave room for
    them within `data.max_seq_length`, with a warning."""
    temperature: Annotated[float, number(0)] = 0.0
    """Sampling temperature; 0 means greedy decoding."""
    top_p: Annotated[float, number(0, 1, above=True)] = 1.0
    """Sample from the smallest set of most probable tokens with this total probability."""
    samples_per_prompt: Count = 1
    """Number of answers per prompt; more than one needs a temperature above 0."""
    stop_ids: tuple[Natural, ...] = ()
    """Ids of tokens that end an answer, in addition to the tokenizer's end of sequence and to
    `eos_token_id` in the teacher's generation_config.json."""
    seed: Natural = 1234
    """Random seed; answers do not depend on batches or the number of processes."""
    keep_unfinished: bool = False
    """Keep answers that reach `max_new_tokens` without a stop token."""
    filter: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        check_flags(self)
        if self.temperature == 0:
            check_greedy(self.samples_per_prompt, self.top_p)


def check_greedy(samples_per_prompt: int, top_p: float) -> None:
    """Raise NemoKDError for settings of a generation that temperature 0 contradicts."""
    if samples_per_prompt > 1:
        raise NemoKDError(
            f"generation.samples_per_prompt={samples_per_prompt} with temperature 0 would generate "
            "the same answer each time; set generation.temperature above 0"
        )
    if top_p < 1:
        raise NemoKDError(
            f"generation.top_p={top_p} with temperature 0 has no effect: only the most probable "
            "token is chosen; set generation.temperature above 0, or leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DumpConfig):
    """Configuration of a generation: `nemo-kd generate` or `examples/generate_with_teacher.py`."""

    generation: GenerationConfig
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(kind="hf"))
