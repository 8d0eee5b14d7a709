"""`nemo-kd convert` from vLLM, DistillKit and Megatron-LM: the same store from each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from nemo_kd.cli.tokenizers import load_tokenizer
from nemo_kd.sft.tokenizer import tokenizer_fingerprint
from nemo_kd.store import Store
from nemo_kd.store.tools.verify import verify
from tests.checkpoints import models
from tests.cli.test_cli import as_json, nemo_kd
from tests.store.test_megatron import compressed, payload, tar

K, S = 4, 12
ROWS = 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "tokenizer"
    models.tokenizer().save_pretrained(path)
    return path


def teacher(size: int) -> tuple[list[list[int]], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens [ROWS, S + 1], drawn from the teacher, and its top-K after each of the first S."""
    rng = np.random.default_rng(1)
    logprobs = torch.log_softmax(torch.from_numpy(rng.normal(0, 3, (ROWS, S, size))), -1)
    values, ids = logprobs.topk(K, -1)
    drawn = [[rng.choice(size, p=p) for p in row] for row in logprobs.exp().numpy()]
    tokens = np.insert(np.array(drawn), 0, 5, axis=1).tolist()
    return tokens, ids.numpy(), values.half().float().numpy()


def responses(path: Path, size: int) -> tuple[Path, list[str]]:
    lines = []
    for tokens, ids, values in zip(*teacher(size), strict=True):
        positions: list[Any] = [None]
        for label, of, at in zip(tokens[1:], ids.tolist(), values.tolist(), strict=True):
            entry = {i: {"logprob": v, "rank": r + 1} for r, (i, v) in enumerate(zip(of, at))}  # noqa: B905
            positions.append({label: {"logprob": -20.0, "rank": K + 5}} | entry)
        choice = {"prompt_logprobs": positions, "prompt_token_ids": tokens}
        lines.append(json.dumps({"choices": [choice]}) + "\n")
    (path / "responses.jsonl").write_text("".join(lines))
    return path / "responses.jsonl", []


def capture(path: Path, size: int) -> tuple[Path, list[str]]:
    bits = int(np.ceil(np.log2(size)))
    tokens, ids, values = teacher(size)
    packed = (ids[..., None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8)
    columns = {
        "input_ids": tokens,
        "compressed_logprobs": values.astype("<f4").view(np.uint8).tolist(),
        "bytepacked_indices": np.packbits(packed.reshape(ROWS, S, -1), axis=2).tolist(),
    }
    settings = {"d": size, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": False}
    (path / "captured").mkdir()
    octets = pa.list_(pa.list_(pa.uint8()))
    kinds = [pa.list_(pa.uint64()), octets, octets]
    arrays = {name: pa.array(columns[name], kind) for name, kind in zip(columns, kinds)}  # noqa: B905
    pq.write_table(pa.table(arrays), path / "captured/data_0.parquet")
    (path / "captured/compression_config.yaml").write_text(yaml.safe_dump(settings))
    return path / "captured", []


def shards(path: Path, size: int) -> tuple[Path, list[str]]:
    tokens, ids, values = teacher(size)
    index = [torch.from_numpy(each)[:, None] for each in ids]
    half = [torch.from_numpy(each)[:, None].half() for each in values]
    (path / "logits").mkdir()
    meta = json.dumps({"saver": {"k": K}}).encode()
    content = compressed(payload(half, index))
    tar(path / "logits/cp0_dp0__0.tar", {"_meta.json": meta, "0.pt.zst": content})
    data = "".join(json.dumps({"input_ids": each}) + "\n" for each in tokens)
    (path / "data.jsonl").write_text(data)
    return path / "logits", ["--data", str(path / "data.jsonl")]


WRITERS: dict[str, Callable[[Path, int], tuple[Path, list[str]]]] = {
    "vLLM prompt_logprobs": responses,
    "DistillKit Parquet": capture,
    "Megatron-LM log-probabilities": shards,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_cache_becomes_a_store(tmp_path: Path, tokenizer: Path, name: str) -> None:
    loaded = load_tokenizer(str(tokenizer))
    source, options = WRITERS[name](tmp_path, loaded.vocab_size)
    target = tmp_path / "store"
    missing = nemo_kd("convert", source, target, *options, fails=True)
    assert "does not record its tokenizer" in missing and not target.exists()
    result = as_json("convert", source, target, "--tokenizer", tokenizer, *options)
    assert result["samples"] == ROWS and result["answer_tokens"] == ROWS * S
    assert result["dropped_lines"] == 0
    store = Store(target)
    assert not list(verify(target))
    assert store.spec.source == {"name": source.name, "format": name}
    assert store.spec.tokenizer["fingerprint"] == tokenizer_fingerprint(loaded)
    assert (store.spec.top_k, store.spec.vocab_size) == (K, loaded.vocab_size)
    for sample, tokens, ids, values in zip(store, *teacher(loaded.vocab_size), strict=True):
        assert sample.input_ids.tolist() == tokens
        assert sample.loss_mask.tolist() == [0] + [1] * S
        assert np.array_equal(sample.topk.ids, ids)
        assert np.array_equal(sample.topk.logits, values)


def test_options_that_have_no_effect_or_are_missing(tmp_path: Path, tokenizer: Path) -> None:
    size = load_tokenizer(str(tokenizer)).vocab_size
    made = {name: writer(tmp_path, size)[0] for name, writer in WRITERS.items()}
    answers, captured, logits = made.values()
    target = tmp_path / "store"
    common = (target, "--tokenizer", tokenizer)
    idle = nemo_kd("convert", answers, *common, "--data", "x", fails=True)
    assert "--data has no effect from vLLM's responses to a store" in " ".join(idle.split())
    assert "give the run's samples" in " ".join(
        nemo_kd("convert", logits, *common, fails=True).split()
    )
    (captured / "compression_config.yaml").rename(tmp_path / "other.yaml")
    assert "--compression-config" in nemo_kd("convert", captured, *common, fails=True)
    single = captured / "data_0.parquet"
    given = ("--compression-config", tmp_path / "other.yaml")
    assert as_json("convert", single, *common, *given)["samples"] == ROWS
    (tmp_path / "other.yaml").write_text("!!python/object/apply:os.getcwd []\n")
    refused = nemo_kd("convert", captured, *common, *given, "--overwrite", fails=True)
    assert "other.yaml" in refused
    assert "no .parquet" not in nemo_kd("convert", tmp_path, tmp_path / "t", fails=True)


def test_invalid_rows_are_dropped_where_asked(tmp_path: Path, tokenizer: Path) -> None:
    source, _ = responses(tmp_path, load_tokenizer(str(tokenizer)).vocab_size)
    lines = source.read_text().splitlines()
    source.write_text("\n".join([lines[0], '{"choices": []}', *lines[1:]]) + "\n")
    command = ("convert", source, tmp_path / "store", "--tokenizer", tokenizer)
    assert "line 2" in nemo_kd(*command, fails=True)
    printed = nemo_kd(*command, "--bad-lines", "drop")
    assert "dropped: " in printed and len(Store(tmp_path / "store")) == ROWS
