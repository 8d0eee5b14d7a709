"""The fingerprint of a checkpoint: what decides its logits, and nothing that lies beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kd.store import StoreSpec, StoreWriter
from nemo_kd.store.fingerprint import checkpoint_fingerprint

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


def test_it_is_that_of_earlier_versions(checkpoint: Path) -> None:
    assert checkpoint_fingerprint(checkpoint) == EARLIER


def test_texts_hidden_files_and_stores_do_not_change_it(checkpoint: Path) -> None:
    for name in ("README.md", "docs/use.MD", ".gitattributes", ".cache/huggingface/model.json"):
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    StoreWriter(checkpoint / "dumps/one", StoreSpec(top_k=2, vocab_size=9))
    (checkpoint / "dumps/one/shard-00000").mkdir()
    (checkpoint / "dumps/one/shard-00000/tokens.bin").write_bytes(b"1")
    assert checkpoint_fingerprint(checkpoint) == EARLIER


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "weights/.metadata", "tokenizer.model", "spec.json"],
)
def test_all_other_files_change_it(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(b"other")
    assert checkpoint_fingerprint(checkpoint) != EARLIER
