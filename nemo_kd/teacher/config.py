"""The configuration of a dump and of a generation: `conf/dump_teacher_topk.yaml` as dataclasses.

`nemo_kd.cli.dump_settings` makes them from Hydra's configuration and checks it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from nemo_kd.errors import NemoKDError
from nemo_kd.settings.values import (
    ACCELERATOR,
    DEVICES,
    PRECISION,
    Count,
    Natural,
    PathText,
    number,
    one_of,
)

Kind = Annotated[str, one_of("nemo", "hf", hf="huggingface transformers gguf", nemo="megatron")]
Side = Annotated[str, one_of("left", "right")]
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
    """Processes on each node; by default as many as torchrun started, 1 without it."""
    num_nodes: Count = 1
    """Nodes."""
    accelerator: Annotated[str, ACCELERATOR] = "gpu"
    """`gpu` or `cpu`; a machine without CUDA uses the CPU in either case."""
    precision: Annotated[Any, PRECISION] = "bf16"
    """`32`, `bf16` or `16`."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The block `teacher`."""

    kind: Kind = "nemo"
    """`nemo`: a .nemo; `hf`: a Hugging Face directory or a .gguf, through transformers."""


@dataclass(frozen=True, kw_only=True)
class TeacherModelConfig:
    """The block `model`: the teacher and its layout. A NeMo teacher takes NeMo's keys as well."""

    restore_from_path: PathText
    """The teacher: a .nemo, or what `teacher.kind` says."""
    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: Count = 1
    """Ranks that share the layers."""
    sequence_parallel: bool = False
    """Megatron's sequence parallelism; needs a tensor-parallel size above 1."""
    micro_batch_size: Count = 8
    """Samples of similar length in one forward pass."""
    megatron_amp_O2: bool = False
    """Hold the weights in `trainer.precision` instead of float32."""
    answer_only_loss: bool = True
    """`false`: store the teacher at all positions, the prompts' included."""


@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """Keys of `data` that decide a sample's tokens: the store records them as its template."""

    chat: bool = False
    """`true`: conversations, as NeMo's GPTSFTChatDataset reads them."""
    max_seq_length: Count = 2048
    """Longer samples are truncated to this many tokens."""
    label_key: str = "output"
    """The field of the answer."""
    add_eos: bool = True
    """End each sample with the end-of-sequence token."""
    add_sep: bool = False
    """Put a separator token between prompt and answer."""
    add_bos: bool = False
    """Begin each sample with the beginning-of-sequence token."""
    truncation_field: str | None = "input"
    """The fields, separated by commas, from which the tokens beyond `max_seq_length` are cut."""
    truncation_method: Side = "right"
    """The end at which a field is cut."""
    prompt_template: str | None = "{input} {output}"
    """The text of a sample, with its fields in braces; it ends with the answer's."""

    def __post_init__(self) -> None:
        if self.prompt_template is None and not self.chat:
            raise NemoKDError(
                "prompt_template is null: expected a template, such as '{input} {output}', or "
                "data.chat=true"
            )

    def template(self) -> dict[str, Any]:
        """The keys of this class and their values."""
        return {each.name: getattr(self, each.name) for each in fields(TemplateConfig)}


@dataclass(frozen=True, kw_only=True)
class DataConfig(TemplateConfig):
    """The block `data`: the SFT rows, as NeMo's SFT makes tokens of them."""

    file_path: PathText
    """The SFT file, JSONL."""
    no_answer: ErrorOrDrop = "error"
    """`drop`: leave out rows that have no answer token within `max_seq_length`."""


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """The block `dump`: what is stored of the teacher. `StoreSpec` checks the values."""

    top_k: Count = 100
    """Logits kept for each answer token, with their ids; for `sampled`, the number of draws."""
    temperatures: tuple[float, ...] = (1.0,)
    """A log-sum-exp is stored for each; 1 must be among them. `model.kd.temperature` of the
    training is one of them."""
    profile: Profile = "plain"
    """How the store encodes them: `plain` (at most 404 bytes per answer token at K = 100),
    `compact` (at most 250), `top_p` (as many as hold a given mass), `sampled` (draws, at most
    40)."""
    profile_options: dict[str, Any] = field(default_factory=dict)
    """Options of the profile: `{p: 0.95}` of `top_p`, `{seed: 0}` of `sampled`."""


@dataclass(frozen=True, kw_only=True)
class DumpConfig:
    """The configuration of `examples/dump_teacher_topk.py`."""

    trainer: TrainerConfig
    teacher: TeacherConfig
    model: TeacherModelConfig
    data: DataConfig
    dump: TopKConfig
    output_dir: PathText
    """The directory of the store."""
    rows_per_shard: Count = 256
    """Rows of a shard, the unit of work and of resuming."""
    max_tokens_per_micro_batch: Count | None = None
    """Limit of rows × longest row of a micro-batch: fewer long samples go through together."""
    rows_per_lm_head: Count = 256
    """Answer tokens that go through the LM head at a time."""
    on_bad_row: ErrorOrDrop = "error"
    """`drop`: leave out rows that cannot be read or whose logits are NaN."""
    jsonl: bool = False
    """Also write `topk.jsonl` into the store, with NeMo-Aligner's keys."""
    overwrite: bool = False
    """Replace a store that another teacher, K or template wrote."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The block `generation.filter`: which answers are kept."""

    pattern: str | None = None
    """A regular expression that the answer must contain."""
    function: str | None = None
    """`module:function`, called with (answer, row of the file); keeps an answer if true."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The block `generation`: how answers are generated."""

    max_new_tokens: Count = 512
    """Tokens of an answer, its stop token included; prompts are truncated to leave room."""
    temperature: Annotated[float, number(0)] = 0.0
    """Sampling temperature; 0: greedy."""
    top_p: Annotated[float, number(0, 1, above=True)] = 1.0
    """Sample among the fewest most probable tokens that hold this mass."""
    samples_per_prompt: Count = 1
    """Answers to each prompt; more than one needs a temperature above 0."""
    stop_ids: tuple[Natural, ...] = ()
    """Tokens that end an answer, besides the tokenizer's end of sequence."""
    seed: Natural = 1234
    """Seed of the random numbers; they do not depend on batches or processes."""
    keep_unfinished: bool = False
    """Keep answers that reach `max_new_tokens` without a stop token."""
    filter: FilterConfig = field(default_factory=FilterConfig)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DumpConfig):
    """The configuration of `examples/generate_with_teacher.py`."""

    generation: GenerationConfig
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(kind="hf"))
