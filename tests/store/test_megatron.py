"""Megatron-LM's shards: written here as its saver does, read with the tokens beside them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nemo_kd.store import Sample, StoreError
from nemo_kd.store.indexed import FieldWriter
from nemo_kd.store.tools.logprobs import Changes
from nemo_kd.store.tools.megatron import read_megatron
from nemo_kd.store.tools.megatron_shards import is_shards, saved_top_k
from nemo_kd.store.tools.padding import Padding
from nemo_kd.topk import ABSENT_ID
from tests.store.samples import spec

V, K, S, B, M, DP, ITERATIONS = 131_072, 3, 8, 2, 2, 2, 2
OF = spec(top_k=K, vocab_size=V)
SAMPLES = ITERATIONS * M * DP * B


def truth() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens [n, S + 1], ids [n, S, K] and probabilities [n, S, K], by number in the data."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (SAMPLES, S + 1))
    ids = rng.permuted(np.broadcast_to(np.arange(V - 50, V), (SAMPLES, S, 50)), axis=2)[..., :K]
    ids[..., 0] -= 70_000  # on both sides of 2^16
    p = np.sort(rng.dirichlet(np.ones(K + 1), (SAMPLES, S))[..., :K])[..., ::-1]
    return tokens, ids, p


def payload(values: list[torch.Tensor], ids: list[torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    low = [(each & 0xFFFF).to(torch.uint16) for each in ids]
    high = [(each >> 16).to(torch.bool) for each in ids]
    torch.save({"values": values, "indices_low": low, "bit_17": high}, buffer)
    return buffer.getvalue()


def compressed(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    octets: bytes = sink.getvalue().to_pybytes()
    return octets


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


META = json.dumps({"hash": "x", "identifiers": {}, "saver": {"k": K, "p": None}}).encode()


def write(
    directory: Path, *, dtype: torch.dtype = torch.float16, cp: int = 1, per_tar: int = 1
) -> None:
    """Write the shards of all ranks, samples dealt out as Megatron's sampler does."""
    directory.mkdir(exist_ok=True)
    _, ids, p = truth()
    for c in range(cp):
        chunks = np.arange(S).reshape(2 * cp, -1)[[c, 2 * cp - 1 - c]].ravel()
        for d in range(DP):
            members = {"_meta.json": META}
            for iteration in range(ITERATIONS):
                values, indices = [], []
                for m in range(M):
                    first = ((iteration * M + m) * DP + d) * B
                    of = slice(first, first + B)
                    at = torch.from_numpy(np.log(p[of][:, chunks])).transpose(0, 1)
                    values.append(at.contiguous().to(dtype))
                    index = torch.from_numpy(ids[of][:, chunks]).transpose(0, 1)
                    indices.append(index.contiguous())
                members[f"{iteration}.pt.zst"] = compressed(payload(values, indices))
                if len(members) > per_tar or iteration == ITERATIONS - 1:
                    tar(directory / f"cp{c}_dp{d}__{iteration}.tar", members)
                    members = {"_meta.json": META}


def data(path: Path, **changes: Any) -> Path:
    rows = ({"input_ids": each.tolist(), **changes} for each in truth()[0])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(directory: Path, beside: Path, of: Any = OF, **options: Any) -> list[Sample]:
    return list(read_megatron(directory, beside, of, Changes(Padding()), **options))


def check(samples: list[Sample], tolerance: float = 2e-3) -> None:
    tokens, ids, p = truth()
    assert [one.row for one in samples] == list(range(SAMPLES))
    for one in samples:
        assert np.array_equal(one.input_ids, tokens[one.row])
        assert one.loss_mask.tolist() == [0] + [1] * S
        assert np.array_equal(one.topk.ids, ids[one.row])
        assert np.allclose(one.topk.logits, np.log(p[one.row]), rtol=tolerance, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cp", [1, 2])
def test_samples_are_the_datas_in_the_order_of_the_run(
    tmp_path: Path, cp: int, dtype: torch.dtype
) -> None:
    write(tmp_path / "logits", dtype=dtype, cp=cp, per_tar=cp)
    assert is_shards(tmp_path / "logits") and saved_top_k(tmp_path / "logits") == K
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    check(read(tmp_path / "logits", data(tmp_path / "x.jsonl")), tolerance)


def test_tokens_of_an_indexed_data_set(tmp_path: Path) -> None:
    write(tmp_path / "logits")
    writer = FieldWriter(tmp_path / "tokens", np.int32)
    for each in truth()[0]:
        writer.add(each)
    writer.close()
    for name in ("tokens", "tokens.bin", "tokens.idx"):
        check(read(tmp_path / "logits", tmp_path / name))


def test_masks_labels_and_shorter_rows(tmp_path: Path) -> None:
    write(tmp_path / "logits")
    tokens, ids, _ = truth()
    rows: list[dict[str, Any]] = [
        {
            "tokens": each[:-1].tolist(),
            "labels": each[1:].tolist(),
            "loss_mask": [0] * (S - 3) + [1, 1, 0],  # at labels
        }
        for each in tokens
    ]
    rows[1] = {"input_ids": tokens[1, :4].tolist(), "loss_mask": [0, 0, 1, 1]}
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, *_ = read(tmp_path / "logits", path, replace(OF, top_k=2))
    assert first.input_ids.tolist() == tokens[0, :S].tolist()
    assert first.loss_mask.tolist() == [0] * (S - 2) + [1, 1]
    assert np.array_equal(first.topk.ids, ids[0, S - 3 : S - 1, :2])
    assert np.array_equal(second.topk.ids, ids[1, 1:3, :2])


def one_shard(directory: Path, values: Any, ids: Any, name: str = "0.pt.zst") -> Path:
    directory.mkdir(exist_ok=True)
    members = {"_meta.json": META, name: compressed(payload(values, ids))}
    tar(directory / "cp0_dp0__0.tar", members)
    return directory


def test_entries_outside_the_nucleus_are_absent(tmp_path: Path) -> None:
    """Top-P masks entries with -1000 and leaves out columns that no token needs."""
    values = torch.tensor([[[-0.5, -2.0]], [[-0.1, -1000.0]]], dtype=torch.bfloat16)
    ids = torch.tensor([[[7, 70_000]], [[5, -1]]])
    directory = one_shard(tmp_path / "logits", [values], [ids])
    (tmp_path / "x.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    (one,) = read(directory, tmp_path / "x.jsonl")
    assert one.topk.ids.tolist() == [[7, 70_000, ABSENT_ID], [5, ABSENT_ID, ABSENT_ID]]
    assert np.isneginf(one.topk.logits[1, 1:]).all()


GOOD = torch.full((2, 1, K), -1.5)
IDS = torch.arange(K).expand(2, 1, K).contiguous()


class Executes:
    def __reduce__(self) -> Any:
        return (eval, ("open('/nonexistent/x')",))


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def parts(values: Any = GOOD, low: Any = None, high: Any = None) -> dict[str, Any]:
    low = IDS.to(torch.uint16) if low is None else low
    high = torch.zeros(IDS.shape, dtype=torch.bool) if high is None else high
    return {"values": [values], "indices_low": [low], "bit_17": [high]}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "no zstd": (b"abc", "not compressed with zstd"),
    "no archive": (compressed(b"abc"), "not an archive of torch.save"),
    "a pickle": (compressed(pickle.dumps(Executes())), "not an archive of torch.save"),
    "the older format": (
        compressed(saved(parts(), _use_new_zipfile_serialization=False)),
        "not an archive of torch.save",
    ),
    "code": (compressed(saved({"values": Executes()})), "not tensors of torch.save"),
    "no lists": (compressed(saved({"values": GOOD})), "expected the lists"),
    "a list": (compressed(saved([GOOD])), "expected the lists"),
    "fewer tensors": (compressed(saved(parts() | {"bit_17": []})), r"have \[1, 1, 0\] tensors"),
    "numbers": (compressed(saved(parts(values=1.0))), "values has a float"),
    "integers as values": (compressed(saved(parts(values=IDS))), "values is torch.int64"),
    "wide ids": (compressed(saved(parts(low=IDS))), "indices_low is torch.int64"),
    "a vector": (compressed(saved(parts(values=GOOD[0, 0]))), r"values is \[3\]"),
    "other shapes": (compressed(saved(parts(values=GOOD[:1]))), "all the same"),
    "strides of 0": (
        compressed(saved(parts(torch.zeros(1).as_strided((1 << 20, 1 << 10, 3), (0, 0, 0))))),
        r"values is \[1048576",
    ),
    "sparse": (compressed(saved(parts(GOOD.to_sparse()))), "values has a Tensor"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    content, message = HOSTILE[kind]
    tar(tmp_path / "cp0_dp0__0.tar", {"_meta.json": META, "0.pt.zst": content})
    (tmp_path / "x.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    with pytest.raises(StoreError, match=f"cp0_dp0__0.tar, 0.pt.zst: .*{message}"):
        read(tmp_path, tmp_path / "x.jsonl")


@pytest.mark.parametrize("at", [0, 150, 600, 1100, -1200])
def test_a_damaged_tar_is_a_store_error(tmp_path: Path, at: int) -> None:
    one_shard(tmp_path, [GOOD], [IDS])
    path = tmp_path / "cp0_dp0__0.tar"
    (tmp_path / "x.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    content = path.read_bytes()
    path.write_bytes(content[:at])
    try:
        assert len(read(tmp_path, tmp_path / "x.jsonl")) < 2
    except StoreError as error:
        assert path.name in str(error)


def test_missing_shards_and_rows_are_named(tmp_path: Path) -> None:
    write(tmp_path / "logits")
    beside = data(tmp_path / "x.jsonl")
    short = tmp_path / "short.jsonl"
    short.write_text("".join(beside.read_text().splitlines(True)[:-1]))
    with pytest.raises(StoreError, match=r"short.jsonl ends within iteration 1 of the shards"):
        read(tmp_path / "logits", short)
    (tmp_path / "logits/cp0_dp1__1.tar").unlink()
    with pytest.raises(StoreError, match="the shards of some ranks have no iteration 1"):
        read(tmp_path / "logits", beside)
    (tmp_path / "logits/cp0_dp0__1.tar").unlink()
    (tmp_path / "logits/cp0_dp0__0.tar").unlink()
    with pytest.raises(StoreError, match="no shard cp0_dp0__"):
        read(tmp_path / "logits", beside)
    (tmp_path / "logits/cp0_dp1__0.tar").unlink()
    with pytest.raises(StoreError, match="has no shards"):
        read(tmp_path / "logits", beside)


ROWS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "not JSON"),
    "no tokens": ('{"text": "x"}', "no input_ids, nor tokens and labels"),
    "too long": (json.dumps({"input_ids": [1] * (S + 2)}), "10 tokens, but .* predictions of 8"),
    "not shifted": ('{"tokens": [1, 2], "labels": [3, 4]}', "not the tokens shifted"),
    "out of range": (json.dumps({"input_ids": [1, V]}), "outside"),
    "a mask of another length": ('{"input_ids": [1, 2], "loss_mask": [1]}', "same length"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, kind: str) -> None:
    row, message = ROWS[kind]
    write(tmp_path / "logits")
    path = data(tmp_path / "x.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], row, *lines[2:]]) + "\n")
    with pytest.raises(StoreError, match=f"x.jsonl, line 2(, iteration 0)?: .*{message}"):
        read(tmp_path / "logits", path)


def test_a_damaged_indexed_data_set_is_a_store_error(tmp_path: Path) -> None:
    write(tmp_path / "logits")
    writer = FieldWriter(tmp_path / "tokens", np.int32)
    for each in truth()[0]:
        writer.add(each)
    writer.close()
    index = (tmp_path / "tokens.idx").read_bytes()
    for bad in (index[:20], b"x" + index[1:], index[:60], index[:18] + b"\xff" * 8 + index[26:]):
        (tmp_path / "tokens.idx").write_bytes(bad)
        with pytest.raises(StoreError, match=r"tokens.idx"):
            read(tmp_path / "logits", tmp_path / "tokens")
