"""The bytes of a store of fixed samples, manifest included: a change of them is a new format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_kd.store import Store
from tests.store.samples import spec, store, write
from tests.store.test_page import draws

FINGERPRINTS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": (
        {},
        "911b114f52cd8b65f6b62c418bfff05617c2e66a0d4582701b92dd788d1e5550",
    ),
    "plain, two temperatures and a large vocabulary": (
        {"temperatures": (2.0, 1.0), "vocab_size": 262_144},
        "0c5dd03e48a7825531859a06fdac97e727d8e2c803f1fe6b5d66f39305a2ead6",
    ),
    "compact": (
        {"profile": "compact", "top_k": 100, "vocab_size": 49_152, "temperatures": (2.0, 1.0)},
        "187fabb06526dc59e2dd69cd6951518523387c0054c3d037e838448f7779eca0",
    ),
    "top_p": (
        {"profile": "top_p", "profile_options": {"p": 0.7}},
        "4643b83914cd4dcbb9a5867ee19ed77938bd64e959a17c7ba874622978d17591",
    ),
    "sampled": (
        {"profile": "sampled", "top_k": 7},
        "5b1f36d8107bfb71089594acd2ba1e810b63e89df0f639ac5bfcc63841733428",
    ),
}
"""Changes of the spec → SHA-256 of the manifest, which has that of every file."""


@pytest.mark.parametrize("kind", FINGERPRINTS)
def test_a_stores_bytes_do_not_change(tmp_path: Path, kind: str) -> None:
    changes, fingerprint = FINGERPRINTS[kind]
    of = spec(**changes)
    if of.profile == "sampled":
        write(tmp_path / "s", of, [draws(row, of) for row in range(7)], parts=False)
    else:
        store(tmp_path / "s", of, parts=False)
    assert Store(tmp_path / "s").fingerprint == fingerprint
