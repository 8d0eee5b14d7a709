"""DistillKit's captures: its own compressor's bytes, rows by hand, packed rows, damaged files.

`distillkit/captures.json` has bytes that DistillKit's LogprobCompressor wrote, and what its
`decompress_to_sparse` returns for them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_kd.store import Sample, StoreError
from nemo_kd.store.tools.distillkit import captured_top_k, files_of, is_distillkit, read_distillkit
from nemo_kd.store.tools.distillkit_codec import (
    Compression,
    compression_of,
    decoded_ids,
    decoded_logprobs,
)
from nemo_kd.store.tools.logprobs import Changes
from nemo_kd.store.tools.padding import Padding
from nemo_kd.topk import ABSENT_ID
from tests.store.samples import spec

CAPTURES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "distillkit/captures.json").read_text()
)
OF = spec(top_k=2, vocab_size=8)
# exact_k = K = 2, float32, d = 8: an id has 3 bits, and two ids a byte.
EXACT = {"d": 8, "k": 2, "exact_k": 2, "residual_bins": [], "delta_encoding": False}
P = [[0.5, 0.25], [0.75, 0.125], [0.375, 0.25]]
TOP = [[1, 7], [4, 2], [3, 0]]
BYTES = [[0b00111100], [0b10001000], [0b01100000]]


def octets(hexes: list[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.array([list(bytes.fromhex(each)) for each in hexes], np.uint8)


@pytest.mark.parametrize("name", CAPTURES)
def test_bytes_that_distillkit_wrote_are_what_it_reads(name: str) -> None:
    capture = CAPTURES[name]
    of = compression_of(capture["configuration"])
    assert decoded_ids(octets(capture["bytepacked_indices"]), of).tolist() == capture["ids"]
    values = decoded_logprobs(octets(capture["compressed_logprobs"]), of)
    assert np.allclose(values, np.array(capture["logprobs"], np.float32), rtol=1e-6, atol=1e-6)


def columns(**changes: Any) -> dict[str, Any]:
    values = [list(np.log(p).astype("<f4").tobytes()) for p in P]
    return {
        "input_ids": [5, 1, 2, 3],
        "compressed_logprobs": values,
        "bytepacked_indices": BYTES,
    } | (changes)


TYPES = {
    "input_ids": pa.list_(pa.uint64()),
    "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
    "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
    "top_values": pa.list_(pa.list_(pa.float32())),
    "token_ids": pa.list_(pa.list_(pa.int64())),
    "labels": pa.list_(pa.int64()),
    "attention_mask": pa.list_(pa.int64()),
}


def write(path: Path, *rows: dict[str, Any], types: dict[str, Any] | None = None) -> Path:
    kinds = TYPES | (types or {})
    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: pa.array([row.get(name) for row in rows], kinds[name]) for name in names}
    pq.write_table(pa.table(table), path)
    return path


def read(
    path: Path, *, of: Any = OF, configuration: Any = EXACT, **options: Any
) -> tuple[list[Sample], Changes]:
    changes = Changes(Padding())
    compression = None if configuration is None else compression_of(configuration)
    return list(read_distillkit(path, of, compression, changes, **options)), changes


def test_a_row_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "data_0.parquet", columns(), columns(input_ids=[1, 1, 1, 1]))
    samples, changes = read(path)
    assert [one.row for one in samples] == [0, 1]
    assert is_distillkit(path) and captured_top_k(path, compression_of(EXACT)) == 2
    one = samples[0]
    assert one.input_ids.tolist() == [5, 1, 2, 3]
    assert one.loss_mask.tolist() == [0, 1, 1, 1]  # entry i predicts token i + 1
    assert one.topk.ids.tolist() == TOP
    assert np.exp(one.topk.logits) == pytest.approx(np.array(P))
    assert not one.topk.logsumexp.any() and one.topk.logsumexp.shape == (3, 1)
    assert changes.to_json() == {"padding_ids_dropped": 0}


def test_raw_rows_need_no_configuration_and_are_sorted(tmp_path: Path) -> None:
    values = [[np.log(b), np.log(a)] for a, b in P]
    ids = [[b, a] for a, b in TOP]
    row = {"input_ids": [5, 1, 2, 3], "top_values": values, "token_ids": ids}
    path = write(tmp_path / "x.parquet", row)
    (one,), _ = read(path, configuration=None)
    assert one.topk.ids.tolist() == TOP
    assert captured_top_k(path, None) == 2
    (one,), _ = read(path, configuration=None, of=replace(OF, top_k=1))
    assert one.topk.ids.tolist() == [[1], [4], [3]]


@pytest.mark.parametrize("inner", [pa.list_(pa.uint8(), 8), pa.large_list(pa.uint8())])
@pytest.mark.parametrize("outer", [pa.list_, pa.large_list])
def test_other_kinds_of_lists_are_read(tmp_path: Path, outer: Any, inner: Any) -> None:
    types = {"compressed_logprobs": outer(inner)}
    (one,), _ = read(write(tmp_path / "x.parquet", columns(), types=types))
    assert np.exp(one.topk.logits) == pytest.approx(np.array(P))


def test_labels_choose_the_learned_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", columns(labels=[-100, -100, 2, 3]))
    (one,), _ = read(path)
    assert one.loss_mask.tolist() == [0, 0, 1, 1]
    assert one.topk.ids.tolist() == TOP[1:]


def test_the_appended_pad_token_is_not_learned(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", columns())
    (one,), changes = read(path, pad_id=3)
    assert one.loss_mask.tolist() == [0, 1, 1, 0]
    assert changes.to_json()["pad_labels_not_learned"] == 1


def test_packed_sequences_are_samples_of_their_own(tmp_path: Path) -> None:
    """Two sequences of 2 tokens and one of padding: each last entry predicts a token cut off."""
    ids = [5, 1, 2, 3, 6]
    five = {name: [*columns()[name], *columns()[name][:2]] for name in TYPES if name in columns()}
    five["input_ids"] = ids
    one = columns(attention_mask=[1] * 4)
    path = write(tmp_path / "x.parquet", {**five, "attention_mask": [1, 1, 2, 2, 0]}, one)
    samples, _ = read(path)
    assert [one.row for one in samples] == [0, 1, 2]
    assert [one.input_ids.tolist() for one in samples[:2]] == [[5, 1], [2, 3]]
    assert samples[0].topk.ids.tolist() == TOP[:1]
    assert samples[1].topk.ids.tolist() == TOP[2:]


def test_files_of_a_directory_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write(tmp_path / f"data_{number}.parquet", columns(input_ids=[number % 8, 1, 1, 1]))
    assert [path.name for path in files_of(tmp_path)] == [
        f"data_{number}.parquet" for number in (0, 2, 10)
    ]
    samples, _ = read(tmp_path)
    assert [one.input_ids[0] for one in samples] == [0, 2, 2]
    assert [one.row for one in samples] == [0, 1, 2]


def test_probabilities_above_1_are_scaled_and_padding_ids_dropped(tmp_path: Path) -> None:
    row = {
        "input_ids": [5, 1, 2],
        "top_values": np.log([[0.75, 0.3], [0.5, 0.25]]).tolist(),
        "token_ids": [[1, 2], [9, 3]],
    }
    (one,), changes = read(write(tmp_path / "x.parquet", row), configuration=None)
    assert np.exp(one.topk.logits[0]) == pytest.approx([0.75 / 1.05, 0.3 / 1.05])
    assert one.topk.ids.tolist() == [[1, 2], [3, ABSENT_ID]]
    assert changes.to_json() == {"padding_ids_dropped": 1, "tokens_scaled_to_mass_1": 1}
    assert changes.padding.mass == pytest.approx(0.5)


NAN = float("nan")
RAW: dict[str, Any] = {"input_ids": [5, 1], "top_values": [[-1.0, -2.0]], "token_ids": [[1, 2]]}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "fewer bytes": (columns(bytepacked_indices=[[], [], []]), "has 0 bytes per token, .* make 1"),
    "ragged": (columns(bytepacked_indices=[[1], [1, 2], [1]]), "different lengths"),
    "other counts": (columns(bytepacked_indices=BYTES[:2]), "columns have different lengths"),
    "short": (columns(input_ids=[1, 2, 3, 4, 5, 6]), "6 tokens, but 3 entries"),
    "null": (columns(input_ids=None), "input_ids is null"),
    "a null": (columns(bytepacked_indices=[None, [1], [1]]), "is null, or has a null"),
    "a token out of range": (columns(input_ids=[8, 1, 1, 1]), "outside"),
    "a huge token": (columns(input_ids=[2**64 - 1, 1, 1, 1]), "expected integers"),
    "an id twice": (columns(bytepacked_indices=[[0b00100100], *BYTES[1:]]), "same id twice"),
    "no numbers": (
        columns(compressed_logprobs=[list(np.array([NAN, -1], "<f4").tobytes())] * 3),
        "not a number",
    ),
    "another configuration's": (
        columns(compressed_logprobs=[list(np.array([3, 1], "<f4").tobytes())] * 3),
        "sum to .* another configuration",
    ),
    "labels of another length": (columns(labels=[1]), "columns have different lengths"),
    "nothing but minus infinity": (
        {**RAW, "top_values": [[-np.inf, -np.inf]]},
        "no logit at all",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_or_left_out(tmp_path: Path, kind: str) -> None:
    bad, message = BAD[kind]
    good = (
        RAW
        if "top_values" in bad
        else columns(**{name: [5, 1, 2, 3] for name in bad.keys() & {"labels"}})
    )
    path = write(tmp_path / "x.parquet", good, bad, good)
    with pytest.raises(StoreError, match=f"x.parquet, row 1: .*({message})"):
        read(path)
    skipped: list[StoreError] = []
    samples, _ = read(path, on_bad_row=skipped.append)
    assert [one.row for one in samples] == [0, 1] and len(skipped) == 1


CONFIGURATIONS: dict[str, tuple[Any, str]] = {
    "none": (None, "with --compression-config"),
    "a list": ([1], "Expected `object`"),
    "no k": ({"d": 8}, "missing required field"),
    "another key": (EXACT | {"e": 1}, "unknown field"),
    "huge": (EXACT | {"k": 1 << 40}, "<="),
    "64 bits": (
        EXACT
        | {
            "exact_k": 1,
            "residual_bins": [{"scale_dtype": "float32", "element_bits": 64, "num_elements": 1}],
        },
        "<= 62",
    ),
    "nothing for the rest": (EXACT | {"exact_k": 1}, "do not fit"),
    "more exact than all": (EXACT | {"exact_k": 3}, "do not fit"),
    "the older": ({"legacy_logit_compression": {"k": 2}}, "is not supported"),
    "the older in a training's": (
        {"teacher": {"kind": "dataset", "legacy_logit_compression": {"k": 2}}},
        "is not supported",
    ),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_bad_configuration_is_an_error(tmp_path: Path, kind: str) -> None:
    configuration, message = CONFIGURATIONS[kind]
    path = write(tmp_path / "x.parquet", columns())
    with pytest.raises(StoreError, match=message):
        read(path, configuration=configuration)


def test_a_trainings_configuration_holds_the_captures() -> None:
    assert compression_of({"teacher": {"logprob_compressor": EXACT}}) == compression_of(EXACT)
    assert compression_of({"logprob_compressor": EXACT}).k == 2
    assert Compression(d=131072, k=1, exact_k=1, residual_bins=[]).index_bits == 17
    assert Compression(d=131073, k=1, exact_k=1, residual_bins=[]).index_bits == 18


def test_older_and_other_columns_are_refused(tmp_path: Path) -> None:
    kinds = {"packed_indices": pa.list_(pa.list_(pa.uint64()))}
    kinds |= dict.fromkeys(("exact_values", "coeffs"), pa.list_(pa.list_(pa.float32())))
    older = {"input_ids": [1], "packed_indices": [[1]], "exact_values": [[1.0]], "coeffs": [[1.0]]}
    path = write(tmp_path / "x.parquet", older, types=kinds)
    assert is_distillkit(path)
    with pytest.raises(StoreError, match=r"older compression .* is not supported"):
        read(path)
    with pytest.raises(StoreError, match="has no column input_ids"):
        read(write(tmp_path / "y.parquet", {"labels": [1]}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"has no \.parquet files"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("position", [0, 4, 0.3, 0.6, -20, -5])
def test_a_damaged_file_is_a_store_error_or_unchanged(tmp_path: Path, position: float) -> None:
    path = write(tmp_path / "x.parquet", columns(), columns())
    content = bytearray(path.read_bytes())
    at = int(position * len(content)) if isinstance(position, float) else position
    content[at] ^= 0xFF
    path.write_bytes(content)
    try:
        samples, _ = read(path)
    except StoreError as error:
        assert "x.parquet" in str(error)
    else:
        assert len(samples) == 2
