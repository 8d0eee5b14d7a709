"""Samples that several stores have in common: equal stores, parts of one, merged ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json
from nemo_kd.store.fingerprint import of_earlier_version
from nemo_kd.store.reader import Store
from nemo_kd.store.spec import is_greedy

TWICE = "{}: they are trained on more often than the others"


def refuse_twice(stores: Sequence[Store]) -> None:
    """Raise StoreError if two of the stores are the same, under any path."""
    seen: dict[str, Store] = {}
    for store in stores:
        if store.fingerprint in seen:
            raise StoreError(
                f"{seen[store.fingerprint].directory} and {store.directory} are the same store; "
                "give it once"
            )
        seen[store.fingerprint] = store


def in_common(stores: Sequence[Store]) -> Iterator[str]:
    """Yield a sentence for each pair of stores with samples in common.

    A sample is the same if teacher, SFT file (by its hash), template and row are. Stores that other
    programs' caches were converted to do not say which rows they have.
    """
    if len(stores) < 2:
        return  # the index, perhaps a large one, is not read for nothing
    pieces = [dict(_pieces(store)) for store in stores]
    for (a, of_a), (b, of_b) in combinations(zip(stores, pieces, strict=True), 2):
        if a.fingerprint == b.fingerprint:
            yield f"{a.directory} and {b.directory} have the same samples"
            continue
        if _of_other_teachers(a, b):
            continue
        for source in of_a.keys() & of_b.keys():
            rows = np.intersect1d(of_a[source], of_b[source])
            if rows.size:
                yield (
                    f"{a.directory} and {b.directory} have {rows.size} samples in common, such as "
                    f"row {rows[0]} of their SFT file"
                )
                break


def _of_other_teachers(a: Store, b: Store) -> bool:
    """Whether the fingerprints tell the teachers apart; not if one is of an earlier version."""
    one, other = (store.spec.teacher.get("fingerprint") for store in (a, b))
    if isinstance(one, str) and isinstance(other, str):
        return one != other and of_earlier_version(one) == of_earlier_version(other)
    return one != other


def _pieces(store: Store) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield (what identifies a source, its rows in the store [rows]) for each source."""
    spec, found = store.spec, dict[str, list[NDArray[np.int64]]]()
    if "sha256" not in canonical_json(spec.source):
        return
    teacher = {name: value for name, value in spec.teacher.items() if name != "fingerprint"}
    template = dict(spec.template)
    if is_greedy(template):  # the seed is not what an earlier version has recorded
        template["generation"] = {**template["generation"], "seed": None}
    for sha256, rows in _rows(spec.source, store.rows):
        key = canonical_json([sha256, teacher, template])
        found.setdefault(key, []).append(rows)
    yield from ((key, np.concatenate(rows)) for key, rows in found.items())


def _rows(
    source: Mapping[str, Any], rows: NDArray[np.int64]
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield (hash of an SFT file, rows of it) for the rows [rows] of a store of this source."""
    merged = source.get("merged")
    if merged is None:
        if source.get("sha256"):
            yield str(source["sha256"]), rows
        return
    starts = [part["offset"] for part in merged]
    which = np.searchsorted(starts, rows, side="right") - 1
    for number, part in enumerate(merged):
        yield from _rows(part["source"], rows[which == number] - part["offset"])
