"""`manifest.json`: a store's spec and the size and SHA-256 of every file; written last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, publish, read_json, sha256_of_json
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.schema import VERSIONS, read_manifest
from nemo_kd.store.spec import StoreSpec

FORMAT = "nemo-kd store"
VERSION = 2
WITHOUT_SEGMENTS = 1
"""Earlier version, which lists the shards of the dump and has no index."""
VERSION_OF_DRAWS = 3
"""The version of stores of draws, which had another encoding before."""
MANIFEST = "manifest.json"
SPEC = "spec.json"  # the spec, written when a dump starts
SHARD = "shard.json"  # the manifest entry of a shard or segment, in its directory
PACKING = "packing.json"  # the plan of the segments, until the manifest is written
REPLACED = ".replaced"  # the store that an unfinished one overwrites
INDEX = "index.bin"  # the rows and lengths of all samples
EXCHANGE = "topk.jsonl"  # the store as NeMo-Aligner's JSONL, written if `jsonl=true`
ANSWERS = "answers.jsonl"  # a generation's answers as SFT rows
SPEC_KEY = "spec_sha256"


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def segment_name(index: int) -> str:
    return f"segment-{index:05d}"


class FileInfo(NamedTuple):  # a tuple for speed: a store of a million samples has 50,000 files
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardInfo:
    """Description of a shard or segment; `first_row` and `last_row` are None without samples."""

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


def shard_json(info: ShardInfo, spec_fingerprint: str) -> str:
    """Return the content of `shard.json`, which has the part's entry and its spec's fingerprint."""
    return canonical_json({**info.to_json(), SPEC_KEY: spec_fingerprint})


def read_shard_info(directory: Path) -> tuple[ShardInfo, str | None]:
    """Read `shard.json` in `directory`; return the shard's entry and its spec's fingerprint."""
    value = read_json(directory / SHARD)
    spec = value.pop(SPEC_KEY, None) if isinstance(value, dict) else None
    return ShardInfo.from_json(value, directory / SHARD), spec


@dataclass(frozen=True)
class Manifest:
    """The spec of a store and the entries of its segments, or of its shards in version 1."""

    spec: StoreSpec
    parts: tuple[ShardInfo, ...]
    rows_per_segment: int | None = None
    """Segment s holds the source rows [s R, (s + 1) R); None in version 1."""
    index: FileInfo | None = None
    """Size and SHA-256 of `index.bin`; None in version 1."""

    @property
    def version(self) -> int:
        """The format's version."""
        if self.index is None:
            return WITHOUT_SEGMENTS
        return VERSION_OF_DRAWS if self.spec.profile == Sampled.name else VERSION

    @property
    def totals(self) -> dict[str, int]:
        """Sums over parts: samples, tokens, answer tokens, samples without answer, bytes."""
        counts = ("samples", "tokens", "answer_tokens", "samples_without_answer")
        sums = {name: sum(getattr(part, name) for part in self.parts) for name in counts}
        sums["bytes"] = sum(info.bytes for part in self.parts for info in part.files.values())
        return sums

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the manifest; covers every file through the hashes it contains."""
        return sha256_of_json(self.to_json())

    @property
    def spec_json(self) -> dict[str, Any]:
        """The spec as the manifest has it: version 1 records the rows per shard, too."""
        return self.spec.to_json() if self.index is not None else self.spec.resumable_json()

    @property
    def spec_fingerprint(self) -> str:
        """Hex SHA-256 of the spec, as each part has it in its `shard.json`."""
        return sha256_of_json(self.spec_json)

    def to_json(self) -> dict[str, Any]:
        parts = [part.to_json() for part in self.parts]
        head = {
            "format": FORMAT,
            "version": self.version,
            "spec": self.spec_json,
            "totals": self.totals,
        }
        if self.index is None:
            return {**head, "shards": parts}
        own = {"index": self.index._asdict(), "rows_per_segment": self.rows_per_segment}
        return {**head, **own, "segments": parts}

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
        version = value.get("version")
        if version not in VERSIONS:
            raise StoreError(
                f"{path}: format version {version}, but this nemo-kd reads {VERSIONS[0]} to "
                f"{VERSIONS[-1]}; use the nemo-kd that wrote it, or dump again"
            )
        segmented = version != WITHOUT_SEGMENTS
        kind, name_of = ("segments", segment_name) if segmented else ("shards", shard_name)
        if not isinstance(value.get(kind), list):
            raise StoreError(f"{path}: no list of {kind}; restore the file")
        parts = tuple(ShardInfo.from_json(part, path) for part in value[kind])
        if [part.name for part in parts] != [name_of(i) for i in range(len(parts))]:
            raise StoreError(f"{path}: its {kind} are not {name_of(0)}, {name_of(1)}, ... in order")
        spec = StoreSpec.from_json(value.get("spec"))
        if spec.profile == Sampled.name and version != VERSION_OF_DRAWS:
            raise StoreError(
                f"{path}: profile {Sampled.name} in format version {version}, an encoding that "
                "this nemo-kd does not read; convert it to Parquet with the nemo-kd that wrote it, "
                "and the Parquet file to a store with this one"
            )
        manifest = cls(spec, parts, *(_index_of(value, path) if segmented else ()))
        if manifest.version != version:
            raise StoreError(
                f"{path}: format version {version} with the profile {spec.profile}, which has "
                f"version {manifest.version}; restore the file"
            )
        if manifest.totals != value.get("totals"):
            raise StoreError(
                f"{path}: totals {value.get('totals')} differ from the sums over {kind} "
                f"{manifest.totals}; restore the file"
            )
        return manifest


def _index_of(value: dict[str, Any], path: Path) -> tuple[int, FileInfo]:
    """Return the rows per segment and the entry of the index."""
    try:
        rows, index = value["rows_per_segment"], FileInfo(**value["index"])
    except (TypeError, KeyError) as error:
        raise StoreError(f"{path}: the entry of {INDEX} is damaged ({error})") from error
    if any(type(number) is not int or number < 0 for number in (rows, index.bytes)) or not rows:
        raise StoreError(f"{path}: rows_per_segment or the size of {INDEX} is not a whole number")
    return rows, index


def refuse_unfinished(directory: Path) -> None:
    """Raise StoreError if `directory` holds no finished store."""
    if (directory / MANIFEST).is_file():
        return
    if not directory.is_dir():
        what = "it is a file" if directory.exists() else "no such directory"
        raise StoreError(f"no store at {directory}: {what}")
    if (directory / PACKING).exists():
        raise StoreError(
            f"{directory}: its shards are being joined to segments; run the same dump command, or "
            "`nemo-kd pack`, again"
        )
    complete = len(list(directory.glob(f"shard-*/{SHARD}")))
    if complete or (directory / SPEC).exists():
        raise StoreError(
            f"{directory}: the dump has not finished ({complete} shards complete, no {MANIFEST}); "
            "run the same dump command again to resume"
        )
    raise StoreError(f"no store at {directory}: it has neither {MANIFEST} nor shards")
