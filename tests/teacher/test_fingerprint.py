"""The fingerprint of a checkpoint: what decides its logits, and nothing that lies beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_kd.store import StoreSpec, StoreWriter, fingerprint
from nemo_kd.store.fingerprint import checkpoint_fingerprint, earlier_fingerprint

EARLIER = "ae6fda3658f61ceac127cb3ea640648af97fa8c30e2751cc93b281cce810daa3"
"""What the first version had for `checkpoint`: stores of earlier versions are resumed."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name, size in {
        "config.json": 5,
        "model.safetensors": 200_000,
        "weights/.metadata": 9,
    }.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(i % 251 for i in range(size)))
    return tmp_path / "model"


def test_that_of_earlier_versions_is_still_known(checkpoint: Path) -> None:
    assert earlier_fingerprint(checkpoint) == EARLIER
    assert checkpoint_fingerprint(checkpoint, EARLIER) == EARLIER
    now = checkpoint_fingerprint(checkpoint)
    assert now.endswith(":full") and checkpoint_fingerprint(checkpoint, now) == now


def test_texts_hidden_files_and_stores_do_not_change_it(checkpoint: Path) -> None:
    before = checkpoint_fingerprint(checkpoint)
    for name in ("README.md", "docs/use.MD", ".gitattributes", ".cache/huggingface/model.json"):
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    StoreWriter(checkpoint / "dumps/one", StoreSpec(top_k=2, vocab_size=9))
    (checkpoint / "dumps/one/shard-00000").mkdir()
    (checkpoint / "dumps/one/shard-00000/tokens.bin").write_bytes(b"1")
    assert checkpoint_fingerprint(checkpoint) == before
    assert earlier_fingerprint(checkpoint) == EARLIER


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "weights/.metadata", "tokenizer.model", "spec.json"],
)
def test_all_other_files_change_it(checkpoint: Path, name: str) -> None:
    before = checkpoint_fingerprint(checkpoint)
    (checkpoint / name).write_bytes(b"other")
    assert checkpoint_fingerprint(checkpoint) != before
    assert earlier_fingerprint(checkpoint) != EARLIER


def flipped(file: Path, places: range) -> Iterator[int]:
    """Yield each place after its byte has been changed; it is restored after that."""
    data = file.read_bytes()
    for place in places:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        yield place
    file.write_bytes(data)


def test_every_byte_counts_up_to_a_gigabyte(tmp_path: Path) -> None:
    """64 samples of a file of 8 MB do not see the embeddings of a few tokens."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(8 << 20))
    before, earlier = checkpoint_fingerprint(tmp_path), earlier_fingerprint(tmp_path)
    unseen = 0
    for _ in flipped(file, range(1000, 8 << 20, 1_000_003)):
        assert checkpoint_fingerprint(tmp_path) != before
        unseen += earlier_fingerprint(tmp_path) == earlier
    assert unseen


def tensors(file: Path, count: int, size: int) -> int:
    """Write a safetensors file of `count` tensors of `size` zeros; return where they begin."""
    each = {
        f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **each}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(count * size))
    return 8 + len(header)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All checkpoints are large ones, and files from 160 bytes on."""
    for name, value in {"ALL": 0, "SPACED": 10, "BLOCK": 16}.items():
        monkeypatch.setattr(fingerprint, name, value)


@pytest.mark.usefixtures("sampled")
def test_no_tensor_of_a_large_checkpoint_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    start = tensors(file, count=40, size=1000)
    before = checkpoint_fingerprint(tmp_path)
    assert before.endswith(":sampled")
    for first in (0, 492, 984):  # first, middle and last 16 bytes
        for _ in flipped(file, range(start + first, start + 40_000, 1000)):
            assert checkpoint_fingerprint(tmp_path) != before
    for _ in flipped(file, range(start + 100, start + 40_000, 5000)):
        assert checkpoint_fingerprint(tmp_path) == before  # between them: the page says so
    for _ in flipped(file, range(10, start, 50)):
        assert checkpoint_fingerprint(tmp_path) != before  # the header


@pytest.mark.usefixtures("sampled")
def test_small_tensors_of_a_large_checkpoint_are_read_in_full(tmp_path: Path) -> None:
    """Norms and biases."""
    file = tmp_path / "model.safetensors"
    start = tensors(file, count=9, size=48)
    before = checkpoint_fingerprint(tmp_path)
    for _ in flipped(file, range(start, start + 9 * 48, 7)):
        assert checkpoint_fingerprint(tmp_path) != before


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize(
    "header",
    [
        *(b"[]", b"{", b"{}", b'{"t": 3}', b'{"t": {"data_offsets": [0]}}'),
        *(b'{"t": {"data_offsets": ["a", null]}}', b'{"t": {"data_offsets": [-90, 5]}}'),
        b'{"t": {"data_offsets": [0, 99999]}}',
    ],
)
def test_other_large_files_and_damaged_ones_are_sampled_evenly(
    tmp_path: Path, header: bytes
) -> None:
    data = len(header).to_bytes(8, "little") + header + bytes(3000)
    for name in ("model.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(data)
    before = checkpoint_fingerprint(tmp_path)
    for name in ("model.safetensors", "model.gguf"):
        for _ in flipped(tmp_path / name, range(len(data) - 16, len(data))):
            assert checkpoint_fingerprint(tmp_path) != before
