"""Stores made of what other programs saved of a teacher: `nemo-kd convert` from their formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_kd.cli.app import summary
from nemo_kd.cli.tokenizers import Tokenizer, load_tokenizer
from nemo_kd.files import read_bounded, size_of
from nemo_kd.outputs import refuse_inputs
from nemo_kd.served.responses import first_top_k, is_response, read_responses
from nemo_kd.sft.tokenizer import tokenizer_fingerprint
from nemo_kd.store import Sample, StoreError, StoreSpec, read_jsonl, write_samples
from nemo_kd.store.codecs import TopP
from nemo_kd.store.manifest import MANIFEST
from nemo_kd.store.tools.agreement import Agreement
from nemo_kd.store.tools.chunks import CHUNK_ID, chunk_paths
from nemo_kd.store.tools.distillkit import (
    CONFIGURATION,
    captured_top_k,
    files_of,
    is_distillkit,
    read_distillkit,
)
from nemo_kd.store.tools.distillkit_codec import Compression, compression_of
from nemo_kd.store.tools.lines import lines_of, record_of
from nemo_kd.store.tools.logprobs import Changes
from nemo_kd.store.tools.megatron import read_megatron
from nemo_kd.store.tools.megatron_shards import is_shards, saved_top_k, shards_of
from nemo_kd.store.tools.padding import Padding
from nemo_kd.visible import say

ON_BAD_LINES = ("error", "drop")
MAX_PADDING_MASS = 0.01
"""Highest plausible mean probability per answer token of padding ids for a trained teacher."""
MAX_CONFIGURATION = 1 << 20
OnBad = Callable[[StoreError], None] | None


class Cache(Protocol):
    """A teacher's log-probabilities in another program's format."""

    format: str
    changes: Changes

    def inputs(self) -> Sequence[str | Path]:
        """Return the files that are read; raise StoreError if one is missing."""

    def top_k(self) -> int:
        """Return the K of the cache."""

    def samples(self, spec: StoreSpec, tokenizer: Tokenizer, on_bad: OnBad) -> Iterator[Sample]:
        """Yield the samples; with `on_bad`, what cannot be read is skipped."""


class Aligner:
    """NeMo-Aligner's JSONL, possibly in chunks."""

    format = "NeMo-Aligner JSONL"

    def __init__(self, source: str, *, renumber: bool) -> None:
        self.source, self.renumber, self.changes = source, renumber, Changes(Padding())

    def inputs(self) -> Sequence[str | Path]:
        return [_file(path) for path in chunk_paths(self.source)]

    def top_k(self) -> int:
        for path in chunk_paths(self.source):
            for _, line in lines_of(path):
                if found := _aligners_top_k(line):
                    return found
        raise StoreError(f"{self.source}: no line has topk_token_ids, as NeMo-Aligner's JSONL does")

    def samples(self, spec: StoreSpec, tokenizer: Tokenizer, on_bad: OnBad) -> Iterator[Sample]:
        return read_jsonl(
            self.source,
            spec,
            renumber=self.renumber,
            on_bad_line=on_bad,
            padding=self.changes.padding,
            widths=self.changes.widths,
        )


class Responses:
    """vLLM's responses with prompt_logprobs, as JSONL."""

    format = "vLLM prompt_logprobs"

    def __init__(self, source: str, *, renumber: bool) -> None:
        self.source, self.renumber, self.changes = Path(source), renumber, Changes(Padding())

    def inputs(self) -> Sequence[str | Path]:
        return [_file(self.source)]

    def top_k(self) -> int:
        return first_top_k(self.source)

    def samples(self, spec: StoreSpec, tokenizer: Tokenizer, on_bad: OnBad) -> Iterator[Sample]:
        return read_responses(
            self.source,
            spec,
            renumber=self.renumber,
            on_bad_line=on_bad,
            changes=self.changes,
        )


class DistillKit:
    """DistillKit's Parquet, one file or a directory of them."""

    format = "DistillKit Parquet"

    def __init__(self, source: str, *, configuration: str | None) -> None:
        self.source, self.changes = Path(source), Changes(Padding())
        beside = (self.source if self.source.is_dir() else self.source.parent) / CONFIGURATION
        self.configuration = Path(configuration) if configuration else beside
        self.compression: Compression | None = None
        if configuration or beside.exists():
            self.compression = _compression(self.configuration)

    def inputs(self) -> Sequence[str | Path]:
        return [*files_of(self.source), *([self.configuration] if self.compression else [])]

    def top_k(self) -> int:
        return captured_top_k(self.source, self.compression)

    def samples(self, spec: StoreSpec, tokenizer: Tokenizer, on_bad: OnBad) -> Iterator[Sample]:
        return read_distillkit(
            self.source,
            spec,
            self.compression,
            self.changes,
            pad_id=tokenizer.pad_id,
            on_bad_row=on_bad,
        )


class Megatron:
    """Megatron-LM's shards, with the run's data beside them."""

    format = "Megatron-LM log-probabilities"

    def __init__(self, source: str, *, data: str | None) -> None:
        if data is None:
            raise StoreError(
                f"{source} does not hold its tokens; give the run's samples in their order with "
                "--data: JSONL with input_ids, or a Megatron indexed data set"
            )
        self.source, self.data, self.changes = Path(source), Path(data), Changes(Padding())

    def inputs(self) -> Sequence[str | Path]:
        shards = [path for paths in shards_of(self.source).values() for path in paths]
        return [*shards, self.data]

    def top_k(self) -> int:
        return saved_top_k(self.source)

    def samples(self, spec: StoreSpec, tokenizer: Tokenizer, on_bad: OnBad) -> Iterator[Sample]:
        return read_megatron(self.source, self.data, spec, self.changes, on_bad_row=on_bad)


JSONL, RESPONSES = "JSONL", "vLLM's responses"
CAPTURE, SHARDS = "DistillKit's Parquet", "Megatron-LM's shards"


def kind_of_source(source: str) -> str | None:
    """Return the kind of cache at a path, by its content and suffix; None if it is none.

    A directory may have the suffix of a file.
    """
    path = Path(source)
    if path.suffix == ".jsonl" and not path.is_dir():
        single = CHUNK_ID not in source and path.is_file()
        _, line = next(lines_of(path), (0, b"")) if single else (0, b"")
        return RESPONSES if is_response(line) else JSONL
    if path.suffix == ".parquet" and not path.is_dir():
        return CAPTURE if path.is_file() and is_distillkit(path) else None
    if not path.is_dir() or (path / MANIFEST).exists():
        return None
    if is_shards(path):
        return SHARDS
    captured = next(path.glob("*.parquet"), None)
    return CAPTURE if captured is not None and is_distillkit(captured) else None


def opened_cache(
    kind: str, source: str, *, renumber: bool, configuration: str | None, data: str | None
) -> Cache:
    """Return the cache at a path, of a kind that `kind_of_source` found."""
    if kind == CAPTURE:
        return DistillKit(source, configuration=configuration)
    if kind == SHARDS:
        return Megatron(source, data=data)
    return (Responses if kind == RESPONSES else Aligner)(source, renumber=renumber)


def from_cache(
    cache: Cache,
    source: str,
    target: str,
    *,
    profile: str | None,
    profile_options: dict[str, Any] | None,
    top_k: int | None,
    segment_bytes: int | None,
    tokenizer: str | None,
    bad_lines: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Convert another program's cache to a store.

    The tokenizer is required because the store records its fingerprint, which training compares
    with that of the student's tokenizer.
    """
    if bad_lines not in (None, *ON_BAD_LINES):
        raise StoreError(f"--bad-lines must be {' or '.join(ON_BAD_LINES)}, not {bad_lines!r}")
    refuse_idle_p(profile_options, profile or "plain")
    inputs = cache.inputs()
    if top_k is None and inputs and all(size_of(path) == 0 for path in inputs):
        raise StoreError(f"{source}: the file is empty; give one with samples")
    if tokenizer is None:
        raise StoreError(needs_tokenizer(source))
    refuse_inputs([target], [*inputs, tokenizer])
    loaded = load_tokenizer(tokenizer)
    spec = StoreSpec(
        top_k=cache.top_k() if top_k is None else top_k,
        vocab_size=loaded.vocab_size,
        profile="plain" if profile is None else profile,
        profile_options=profile_options or {},
        tokenizer=identified(loaded, tokenizer),
        source={"name": Path(source).name, "format": cache.format},
    )
    dropped: list[StoreError] = []

    def drop(error: StoreError) -> None:
        dropped.append(error)
        say(f"dropped: {error}")

    agreement, read = Agreement(), 0

    def samples() -> Iterator[Sample]:
        nonlocal agreement, read
        for sample in cache.samples(spec, loaded, drop if bad_lines == "drop" else None):
            agreement += Agreement.of_sample(sample, spec)
            read += 1
            yield sample
        if dropped and not read:
            raise StoreError(
                f"no store is written, because all {len(dropped)} lines were dropped; the first: "
                f"{dropped[0]}"
            )

    manifest = write_samples(
        samples(), target, spec, segment_bytes=segment_bytes, overwrite=overwrite
    )
    cut = warned_of_cut(source, cache.changes.widths, spec.top_k if top_k is None else None)
    for warning in (
        agreement.warning(),
        _padding_warning(cache.changes.padding, agreement.tokens, tokenizer),
    ):
        if warning:
            say(f"WARNING: {source}: {warning}")
    return {
        **summary(target, manifest),
        "dropped_lines": len(dropped),
        **cut,
        **cache.changes.to_json(),
        **agreement.to_json(),
    }


def refuse_idle_p(profile_options: Mapping[str, Any] | None, profile: str) -> None:
    """Raise StoreError for a `--p` with a profile that has no p."""
    if profile_options and profile != TopP.name:
        raise StoreError(
            f"--p {profile_options['p']:g} is for the profile {TopP.name}, but the store would "
            f"have the profile {profile}: add --profile {TopP.name}, or omit --p"
        )


def needs_tokenizer(source: str) -> str:
    """Return the error message for a source that does not record its tokenizer."""
    return (
        f"{source} does not record its tokenizer; give its directory or .model file with "
        "--tokenizer"
    )


def identified(tokenizer: Tokenizer, path: str) -> dict[str, Any]:
    """Return what a store's spec records of a tokenizer."""
    return {
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "path": str(Path(path).absolute()),
    }


def _padding_warning(padding: Padding, tokens: float, tokenizer: str) -> str:
    if padding.mass <= MAX_PADDING_MASS * tokens:
        return ""
    return (
        f"the ids beyond the tokenizer's vocabulary, which were dropped, had "
        f"{padding.mass / max(tokens, 1):.1%} of the teacher's probability, too much for padding; "
        f"check that {tokenizer} is its tokenizer"
    )


def warned_of_cut(source: str, widths: Counter[int], top_k: int | None) -> dict[str, int]:
    """Return the number of samples of which ids were cut unasked, and warn of them.

    `top_k` None: the user, or the source, has set K.
    """
    cut = sum(count for width, count in widths.items() if top_k is not None and width > top_k)
    if not cut:
        return {"samples_cut_to_top_k": 0}
    warning = (
        f"{cut} of {widths.total()} samples have up to {max(widths)} ids per token and were cut to "
        f"{top_k}, as many as the first have; convert them apart to keep all, or give --top-k "
        f"{top_k}"
    )
    say(f"WARNING: {source}: {warning}")
    return {"samples_cut_to_top_k": cut}


def _aligners_top_k(line: bytes) -> int:
    try:
        return len(record_of(line)["topk_token_ids"][0])
    except (StoreError, KeyError, IndexError, TypeError):
        return 0


def _compression(path: Path) -> Compression:
    import yaml  # needed for this only

    try:
        return compression_of(yaml.safe_load(read_bounded(path, MAX_CONFIGURATION)))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise StoreError(f"{path}: {error}") from error


def _file(path: Path) -> Path:
    if not path.exists() or path.is_dir():
        raise StoreError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    return path
