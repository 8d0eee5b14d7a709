"""`manifest.json`: a store's spec and the size and SHA-256 of every file; written last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, publish, read_json, sha256_of_json
from nemo_kd.store.schema import read_manifest
from nemo_kd.store.spec import StoreSpec

FORMAT = "nemo-kd store"
VERSION = 1
MANIFEST = "manifest.json"
SPEC = "spec.json"  # the spec, written when a dump starts
SHARD = "shard.json"  # a shard's manifest entry, in the shard's directory
EXCHANGE = "topk.jsonl"  # the store as NeMo-Aligner's JSONL, written if `jsonl=true`
SPEC_KEY = "spec_sha256"


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


class FileInfo(NamedTuple):  # a tuple for speed: a store of a million samples has 50,000 files
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardInfo:
    """A shard's entry in the manifest; `first_row` and `last_row` are None without samples."""

    name: str
    samples: int
    tokens: int
    answer_tokens: int
    samples_without_answer: int
    first_row: int | None
    last_row: int | None
    files: dict[str, FileInfo]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "files": {n: info._asdict() for n, info in self.files.items()}}

    @classmethod
    def from_json(cls, value: Any, where: Path) -> ShardInfo:
        try:
            files = {name: FileInfo(**info) for name, info in value["files"].items()}
            shard = cls(**{**value, "files": files})
        except (TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"{where}: a shard's entry is damaged ({error})") from error
        counts = [shard.samples, shard.tokens, shard.answer_tokens, shard.samples_without_answer]
        counts += [row for row in (shard.first_row, shard.last_row) if row is not None]
        counts += [info.bytes for info in files.values()]
        if any(type(count) is not int or count < 0 for count in counts):
            raise StoreError(f"{where}: a count of {shard.name} is not a non-negative integer")
        return shard


def read_shard_info(directory: Path) -> tuple[ShardInfo, str | None]:
    """Read `shard.json` in `directory`; return the shard's entry and its spec's fingerprint."""
    value = read_json(directory / SHARD)
    spec = value.pop(SPEC_KEY, None) if isinstance(value, dict) else None
    return ShardInfo.from_json(value, directory / SHARD), spec


@dataclass(frozen=True)
class Manifest:
    """The spec of a store and the entries of its shards."""

    spec: StoreSpec
    shards: tuple[ShardInfo, ...]

    @property
    def totals(self) -> dict[str, int]:
        """Sums over shards: samples, tokens, answer tokens, samples without answer, bytes."""
        counts = ("samples", "tokens", "answer_tokens", "samples_without_answer")
        sums = {name: sum(getattr(shard, name) for shard in self.shards) for name in counts}
        sums["bytes"] = sum(info.bytes for shard in self.shards for info in shard.files.values())
        return sums

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the manifest; covers every file through the hashes it contains."""
        return sha256_of_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "spec": self.spec.to_json(),
            "totals": self.totals,
            "shards": [shard.to_json() for shard in self.shards],
        }

    def write(self, directory: Path) -> None:
        """Write `manifest.json`, which finishes the store."""
        publish(directory / MANIFEST, canonical_json(self.to_json()))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest in `directory`; raise StoreError if damaged or of another version."""
        path = directory / MANIFEST
        value = read_manifest(path, FORMAT)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise StoreError(f'{path}: not the manifest of a store (no "format": "{FORMAT}")')
        if value.get("version") != VERSION:
            raise StoreError(
                f"{path}: format version {value.get('version')}, but this nemo-kd reads {VERSION}; "
                "use the nemo-kd that wrote it, or dump again"
            )
        if not isinstance(value.get("shards"), list):
            raise StoreError(f"{path}: no list of shards; restore the file")
        shards = tuple(ShardInfo.from_json(shard, path) for shard in value["shards"])
        if [shard.name for shard in shards] != [shard_name(i) for i in range(len(shards))]:
            raise StoreError(
                f"{path}: its shards are not {shard_name(0)}, {shard_name(1)}, ... in order"
            )
        manifest = cls(StoreSpec.from_json(value.get("spec")), shards)
        if manifest.totals != value.get("totals"):
            raise StoreError(
                f"{path}: totals {value.get('totals')} differ from the shards' sums "
                f"{manifest.totals}; restore the file"
            )
        return manifest


def refuse_unfinished(directory: Path) -> None:
    """Raise StoreError if `directory` holds no finished store."""
    if (directory / MANIFEST).is_file():
        return
    if not directory.is_dir():
        what = "it is a file" if directory.exists() else "no such directory"
        raise StoreError(f"no store at {directory}: {what}")
    complete = len(list(directory.glob(f"shard-*/{SHARD}")))
    if complete or (directory / SPEC).exists():
        raise StoreError(
            f"{directory}: the dump has not finished ({complete} shards complete, no {MANIFEST}); "
            "run the same dump command again to resume"
        )
    raise StoreError(f"no store at {directory}: it has neither {MANIFEST} nor shards")
