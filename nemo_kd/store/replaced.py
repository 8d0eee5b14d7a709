"""Detect shards that were replaced after their store was opened.

`shard.json` contains the size and SHA-256 of each file of its shard and the fingerprint of its spec
and is published together with the files. Reading this small file therefore suffices to detect a
replacement; nothing needs to be hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.files import read_json
from nemo_kd.store.manifest import SHARD, SPEC, Manifest, ShardInfo, read_shard_info
from nemo_kd.store.spec import StoreSpec

RESTART = (
    "restart the run on the store as it is now, or restore the original; a new dump beside a "
    "running job needs its own directory, without overwrite=true"
)


def refuse_other_ranks(directory: Path, fingerprints: Sequence[str]) -> None:
    """Raise StoreError if the ranks of a job opened different stores at `directory`."""
    other = next((i for i, one in enumerate(fingerprints) if one != fingerprints[0]), None)
    if other is not None:
        raise StoreError(
            f"{directory}: rank 0 opened the store {fingerprints[0][:12]}, rank {other} the store "
            f"{fingerprints[other][:12]}: it was replaced while the job started, or differs "
            "between nodes; give all nodes the same store and start again"
        )


class Replacement:
    """Detector of shards in `directory` that differ from their entries in `manifest`."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest = directory, manifest
        self._spec = manifest.spec_fingerprint

    def refuse(self, info: ShardInfo) -> None:
        """Raise StoreError if the shard's `shard.json` differs from `info` or is missing."""
        shard = self._directory / info.name
        if not (shard / SHARD).is_file():
            raise StoreError(
                f"{shard} is gone: {shard / SHARD} existed when the store was opened; the store "
                f"was removed or moved, or is being rewritten: {RESTART}"
            )
        found, spec = read_shard_info(shard)
        if (found, spec) != (info, self._spec):
            difference = self._difference(info, found, spec)
            raise StoreError(
                f"{shard} was replaced after the store was opened: {difference}; {RESTART}"
            )

    def _difference(self, info: ShardInfo, found: ShardInfo, spec: str | None) -> str:
        """Describe the difference; the spec comes first since it identifies the rows' origin."""
        if spec != self._spec:
            try:
                now = StoreSpec.from_json(read_json(self._directory / SPEC))
            except StoreError:  # the store is being rewritten
                return f"its {SHARD} is of another spec"
            changes = self._manifest.spec.differences(now)
            if changes:
                return ", ".join(f"{name} was {a!r} and is {b!r}" for name, a, b in changes[:5])
        names = [name for name, file in info.files.items() if found.files.get(name) != file]
        if names:
            return f"{', '.join(names)} had another SHA-256 when the store was opened"
        return f"its {SHARD} differs from the manifest"
