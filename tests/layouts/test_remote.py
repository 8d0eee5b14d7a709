"""Training from an S3 server: the losses of the same training from a directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_kd.store import push
from tests.layouts.conftest import LAYOUTS, train_overrides
from tests.processes import run_script
from tests.runs import steps
from tests.store.s3 import BUCKET, serving


@pytest.mark.slow
def test_two_ranks_and_their_workers_train_from_s3(
    tiny: Path,
    dump: Callable[..., Path],
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers, directory = "model.data.train_ds.num_workers=1", tmp_path / "run"
    processes, overrides = LAYOUTS["dp2"]
    with serving() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("NEMO_KD_CACHE", str(tmp_path / "cache"))
        for split in ("train", "heldout"):
            push(dump(split=split), f"s3://{BUCKET}/{split}")
        urls = f"s3://{BUCKET}/train", f"s3://{BUCKET}/heldout"
        base = train_overrides(tiny, *urls, directory)
        run_script("train_gpt_sft_kd.py", *base, *overrides, workers, processes=processes)
    local = steps(train("dp2", workers))
    assert [line["loss"] for line in steps(directory)] == [line["loss"] for line in local]
