"""Whether a shard on disk is still the one that an open store's manifest lists.

`shard.json` has the size and SHA-256 of each file of its shard and the fingerprint of its spec, and
is published together with them: one small file read for each shard that is opened, no hashing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.files import read_json
from nemo_kd.store.manifest import SHARD, SPEC, Manifest, ShardInfo, read_shard_info
from nemo_kd.store.spec import StoreSpec

START_AGAIN = (
    "start the run again on the store as it is now, or put back the one that it began with; a new "
    "dump beside a run belongs in a directory of its own, without overwrite=true"
)


def refuse_other_ranks(directory: Path, fingerprints: Sequence[str]) -> None:
    """StoreError where the store at `directory` is not the same one on all ranks of a job."""
    other = next((i for i, one in enumerate(fingerprints) if one != fingerprints[0]), None)
    if other is not None:
        raise StoreError(
            f"{directory}: rank 0 opened the store {fingerprints[0][:12]}, rank {other} the store "
            f"{fingerprints[other][:12]}: it was replaced while the job started, or is another one "
            "on another node; give all nodes the same store, and start again"
        )


class Replacement:
    """Refuses the shards of `directory` that are not those of `manifest`."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest = directory, manifest
        self._spec = manifest.spec.fingerprint

    def refuse(self, info: ShardInfo) -> None:
        """StoreError where the shard's own entry is not `info`, or the shard is gone."""
        shard = self._directory / info.name
        if not (shard / SHARD).is_file():
            raise StoreError(
                f"{shard} is gone: {shard / SHARD} was there when the store was opened; the store "
                f"was removed, moved, or is being written anew: {START_AGAIN}"
            )
        found, spec = read_shard_info(shard)
        if (found, spec) != (info, self._spec):
            difference = self._difference(info, found, spec)
            raise StoreError(
                f"{shard} was replaced after the store was opened: {difference}; {START_AGAIN}"
            )

    def _difference(self, info: ShardInfo, found: ShardInfo, spec: str | None) -> str:
        """What differs, the specification first: it says whose rows these are."""
        if spec != self._spec:
            try:
                now = StoreSpec.from_json(read_json(self._directory / SPEC))
            except StoreError:  # being written anew
                return f"its {SHARD} is of another specification"
            changes = self._manifest.spec.differences(now)
            if changes:
                return ", ".join(f"{name} was {a!r} and is {b!r}" for name, a, b in changes[:5])
        names = [name for name, file in info.files.items() if found.files.get(name) != file]
        if names:
            return f"{', '.join(names)} had another SHA-256 when the store was opened"
        return f"its {SHARD} is not what the manifest said"
