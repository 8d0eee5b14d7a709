"""A tiny teacher, its rows, its store by transformers, and a server of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from nemo_kd.cli.teacher import load, read
from nemo_kd.store import Store
from nemo_kd.teacher.dump import dump
from tests.checkpoints import models
from tests.processes import ROOT
from tests.served.server import VLLM_LIMIT, Server
from tests.tiny import functions

ROWS = 11
SHARED = [
    "data.max_seq_length=100",
    "rows_per_shard=4",
    "dump.top_k=20",
    "trainer.precision=32",
    "trainer.devices=1",
]


def configuration(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("dump_teacher_topk", [*SHARED, *overrides])


def run(*overrides: str) -> Store:
    """Dump in this process; return the store."""
    cfg = configuration(*overrides)
    config = read(cfg)
    manifest = dump(config, load(config, cfg))
    assert manifest is not None
    return Store(config.output_dir)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama/: as many logits as tokens; padded/: one more; train.jsonl; store: of llama/."""
    path = tmp_path_factory.mktemp("served")
    models.save(models.llama("tied_grouped"), path / "padded")
    model = models.llama("tied_grouped")
    model.resize_token_embeddings(models.TOKENS)
    models.save(model, path / "llama")
    rows = "".join(json.dumps(pair) + "\n" for pair in functions()[:ROWS])
    (path / "train.jsonl").write_text(rows)
    run(*hf(path, path / "store"))
    return path


def hf(teacher: Path, store: Path) -> list[str]:
    paths = [f"data.file_path={teacher}/train.jsonl", f"output_dir={store}"]
    return ["teacher.kind=hf", f"model.restore_from_path={teacher}/llama", *paths]


def served(server: Server, teacher: Path, store: Path, *more: str) -> list[str]:
    """Overrides of a dump by the server."""
    return [
        "teacher.kind=served",
        f"teacher.url={server.url}",
        f"teacher.tokenizer={teacher}/llama",
        f"data.file_path={teacher}/train.jsonl",
        f"output_dir={store}",
        *more,
    ]


@pytest.fixture(scope="session")
def _server(teacher: Path) -> Iterator[Server]:
    with Server(teacher / "llama") as server:
        yield server


@pytest.fixture
def server(_server: Server) -> Server:
    """The server of llama/, without faults and without the requests of an earlier test's client."""
    deadline = time.monotonic() + 10
    while _server.connections and time.monotonic() < deadline:
        time.sleep(0.01)
    fresh: dict[str, Any] = {"faults": lambda number: "", "seconds": 0.0, "requests": []}
    fresh |= {
        "most_in_flight": 0,
        "tokenize": "",
        "limit_words": VLLM_LIMIT,
        "max_logprobs": 400,
        "key": "",
        "names": ["teacher"],
    }
    for name, value in fresh.items():
        setattr(_server, name, value)
    return _server
