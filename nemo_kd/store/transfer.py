"""Copy parts and other files of a remote store to a directory; a part appears once it is complete.

A part is copied to a hidden directory, where an interrupted copy is continued, and then renamed.
Its `shard.json` is written from the manifest, which determines its bytes, like `spec.json`.
"""

from __future__ import annotations

from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, commit, publish
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.layout import file_names
from nemo_kd.store.manifest import INDEX, SHARD, SPEC, FileInfo, Manifest, ShardInfo, shard_json
from nemo_kd.store.remote import Progress, RemoteFiles


def part_files(manifest: Manifest, info: ShardInfo) -> dict[str, FileInfo]:
    """Return the files of a part by path relative to the store; `shard.json` is not among them.

    Raises StoreError if they are not those of the profile.
    """
    names = file_names(codec_of(manifest.spec))
    if sorted(info.files) != names:
        raise StoreError(f"{info.name} has the files {sorted(info.files)}, expected {names}")
    return {f"{info.name}/{name}": info.files[name] for name in names}


def top_files(manifest: Manifest) -> dict[str, FileInfo]:
    """Return the files beside the manifest that it lists with their SHA-256, by name."""
    return {} if manifest.index is None else {INDEX: manifest.index}


def part_json(manifest: Manifest, info: ShardInfo) -> str:
    """Return the content of a part's `shard.json`."""
    return shard_json(info, manifest.spec_fingerprint)


def fetch_top(files: RemoteFiles, manifest: Manifest, directory: Path) -> None:
    """Copy the files beside the manifest to `directory`."""
    files.download(top_files(manifest), directory)
    publish(directory / SPEC, canonical_json(manifest.spec_json))


def fetch_part(
    files: RemoteFiles,
    manifest: Manifest,
    number: int,
    directory: Path,
    progress: Progress = lambda _: None,
) -> None:
    """Copy a part to `directory`, where it does not exist yet."""
    info = manifest.parts[number]
    work = directory / f".{info.name}.part"
    files.download(part_files(manifest, info), work, progress)
    (work / info.name / SHARD).write_text(part_json(manifest, info), encoding="utf-8")
    commit(work / info.name, directory / info.name)
    work.rmdir()
