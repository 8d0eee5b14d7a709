"""A store is read, verified and copied with torch, numpy and msgspec alone installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.bare import extra, run_bare
from tests.conftest import ROOT
from tests.store.samples import spec, store

READ = """
import sys
sys.path.insert(0, sys.argv[1])
from nemo_kd.store import Store, convert, stats, verify, write_jsonl
for directory in sys.argv[2:]:
    store = Store(directory)
    assert list(verify(store)) == []
    convert(store, directory + "-plain", profile="plain")
    write_jsonl(directory + ".jsonl", store)
    print(sum(float(one.topk.logits.sum()) for one in store), stats(store).tokens)
"""


def test_a_store_needs_torch_numpy_and_msgspec_alone(tmp_path: Path) -> None:
    profiles: dict[str, dict[str, Any]] = {
        "plain": {},
        "compact": {"profile": "compact"},
        "cut": {"profile": "top_p", "profile_options": {"p": 0.9}},
    }
    stores = [
        store(tmp_path / name, replace(spec(), **changes)) for name, changes in profiles.items()
    ]
    done = run_bare(tmp_path, extra("store"), "-c", READ, str(ROOT), *map(str, stores))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(stores)
    assert all(np.isfinite(float(line.split()[0])) for line in lines[:2])
    assert all(line.split()[1] == "16" for line in lines)
