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
        "3c5715b64c8ad480e821513f6c7bd73bc24484327ddd063414ed1280e2512721",
    ),
    "plain, two temperatures and a large vocabulary": (
        {"temperatures": (2.0, 1.0), "vocab_size": 262_144},
        "d66e77d2266d23ab6ede21d6befb535c12cf6c874cdea387fc448fc8154f93da",
    ),
    "compact": (
        {"profile": "compact", "top_k": 100, "vocab_size": 49_152, "temperatures": (2.0, 1.0)},
        "901a71c2b79fd61cc8d2f40ecd1de1724c6f5f79a7d0e4c643ed8061a8c42a22",
    ),
    "top_p": (
        {"profile": "top_p", "profile_options": {"p": 0.7}},
        "466502fbacaee39f06b24c1e8941a553cf741166eae08aff470082d44dec2f82",
    ),
    "sampled": (
        {"profile": "sampled", "top_k": 7},
        "5f471143c1fafb6e1686b7597b01cb07a74662ab32924a4d8afed7908ac1ae59",
    ),
}
"""Changes of the spec → SHA-256 of the manifest, which has that of every file."""


@pytest.mark.parametrize("kind", FINGERPRINTS)
def test_a_stores_bytes_do_not_change(tmp_path: Path, kind: str) -> None:
    changes, fingerprint = FINGERPRINTS[kind]
    of = spec(**changes)
    if of.profile == "sampled":
        write(tmp_path / "s", of, [draws(row, of) for row in range(7)])
    else:
        store(tmp_path / "s", of)
    assert Store(tmp_path / "s").fingerprint == fingerprint
