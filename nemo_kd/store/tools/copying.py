"""Push a store to a URL and pull one from there; both can be interrupted and repeated.

The manifest is pushed last. Until then `transfer.json` names it, so that an unfinished copy is only
continued with the same store. A pull is made beside its directory, and renamed. Repeated, it copies
the parts again that are damaged.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, commit, full_disk_explained, size_of
from nemo_kd.lock import DirectoryLock
from nemo_kd.store.manifest import MANIFEST, SHARD, SPEC, Manifest, ShardInfo, refuse_unfinished
from nemo_kd.store.ours import remove_part
from nemo_kd.store.parts import is_intact
from nemo_kd.store.remote import RemoteFiles
from nemo_kd.store.schema import MAX_MANIFEST
from nemo_kd.store.transfer import (
    fetch_part,
    fetch_top,
    part_files,
    part_json,
    top_files,
)

TRANSFER = "transfer.json"
Advance = Callable[[int, int], None]
"""Function of the number of bytes copied so far and of all bytes."""


class _Bar:
    """Progress in bytes; those of repeated attempts count until their part is complete."""

    def __init__(self, advance: Advance, total: int) -> None:
        self._advance, self._total, self._done, self._now = advance, total, 0, 0

    def add(self, count: int) -> None:
        self._now = min(self._now + count, self._total)
        self._advance(self._now, self._total)

    def complete(self, info: ShardInfo) -> None:
        """Count a part as copied, in place of what was added since the last call."""
        self._done = self._now = self._done + sum(file.bytes for file in info.files.values())
        self._advance(self._now, self._total)


def push(
    directory: str | Path,
    url: str,
    advance: Advance = lambda *_: None,
    on_unchanged: Callable[[], None] = lambda: None,
) -> Manifest:
    """Copy a store to a URL; files that are there with their size are not copied again.

    If all are there, `on_unchanged()` is called. Each file's SHA-256 is compared with the manifest
    before it is copied. Raises StoreError if the URL holds anything else, or if the store is
    unfinished or damaged.
    """
    source, files = Path(directory), RemoteFiles(url)
    refuse_unfinished(source)
    manifest, text = Manifest.read(source), (source / MANIFEST).read_bytes()
    there = files.sizes()
    _refuse_other_url(files, there, text)
    if _is_pushed(there, source, manifest):
        on_unchanged()
        return manifest
    if MANIFEST not in there:
        files.create()
        files.write(TRANSFER, _marker(text))
    bar = _Bar(advance, manifest.totals["bytes"])
    for info in manifest.parts:
        _push_part(source, files, manifest, info, there, bar)
    files.upload([SPEC, *top_files(manifest)], source)
    _refuse_missing(files, manifest)
    if MANIFEST not in there:
        files.write(MANIFEST, text)
    if MANIFEST not in there or TRANSFER in there:
        files.remove(TRANSFER)
    return manifest


def _is_pushed(there: Mapping[str, int], source: Path, manifest: Manifest) -> bool:
    """Return whether a URL has all files of the store with their sizes, and nothing unfinished."""
    listed = {name: file.bytes for name, file in top_files(manifest).items()}
    listed[SPEC] = size_of(source / SPEC) or 0
    for info in manifest.parts:
        listed |= {name: file.bytes for name, file in part_files(manifest, info).items()}
        listed[f"{info.name}/{SHARD}"] = len(part_json(manifest, info).encode())
    complete = all(there.get(name) == octets for name, octets in listed.items())
    return complete and MANIFEST in there and TRANSFER not in there


def _push_part(
    source: Path,
    files: RemoteFiles,
    manifest: Manifest,
    info: ShardInfo,
    there: Mapping[str, int],
    bar: _Bar,
) -> None:
    listed = part_files(manifest, info)
    missing = [name for name, file in listed.items() if there.get(name) != file.bytes]
    for name in missing:
        if not is_intact(source / name, listed[name]):
            raise StoreError(
                f"{source / name} differs from the manifest, see `nemo-kd verify`; mend the store "
                "and push it again"
            )
    files.upload(missing, source, bar.add)
    files.write(f"{info.name}/{SHARD}", part_json(manifest, info).encode())
    bar.complete(info)


def _refuse_other_url(files: RemoteFiles, there: Mapping[str, int], text: bytes) -> None:
    """Raise StoreError unless the URL is empty, or holds this store or an unfinished copy of it."""
    if MANIFEST in there:
        if there[MANIFEST] != len(text) or files.read(MANIFEST, MAX_MANIFEST) != text:
            raise StoreError(f"{files.url} holds another store; choose another URL")
    elif TRANSFER in there:
        if files.read(TRANSFER, MAX_MANIFEST) != _marker(text):
            raise StoreError(
                f"{files.url} holds an unfinished copy of another store; remove it, or choose "
                "another URL"
            )
    elif there:
        raise StoreError(f"{files.url} holds {min(there)}, not a store; choose another URL")


def _refuse_missing(files: RemoteFiles, manifest: Manifest) -> None:
    """Raise StoreError if a file has not arrived at the URL with its size."""
    there = files.sizes()
    listed = top_files(manifest)
    for info in manifest.parts:
        listed |= part_files(manifest, info)
    wrong = [name for name, file in listed.items() if there.get(name) != file.bytes]
    if wrong:
        raise StoreError(f"{files.url}/{wrong[0]} has not arrived; run the same command again")


def _marker(text: bytes) -> bytes:
    return canonical_json({"manifest_sha256": hashlib.sha256(text).hexdigest()}).encode()


def pull(
    url: str,
    directory: str | Path,
    advance: Advance = lambda *_: None,
    on_unchanged: Callable[[], None] = lambda: None,
) -> Manifest:
    """Copy the store at a URL to a directory; intact files of an interrupted copy are kept.

    Every file's SHA-256 is compared on arrival. Of a complete copy, damaged and missing parts are
    copied again; if there are none, `on_unchanged()` is called. Raises StoreError if the directory
    holds anything else, or if the remote store is damaged.
    """
    files, target = RemoteFiles(url), Path(directory).absolute()
    text = files.read(MANIFEST, MAX_MANIFEST)
    if _is_pulled(target, text):
        return _mended(files, target, advance, on_unchanged)
    with _work_beside(target) as new:
        (new / MANIFEST).write_bytes(text)
        manifest = Manifest.read(new)
        bar = _Bar(advance, manifest.totals["bytes"])
        for number, info in enumerate(manifest.parts):
            _fetch(files, manifest, number, new, bar)
            bar.complete(info)
        fetch_top(files, manifest, new)
        commit(new, target)
    return manifest


def _mended(
    files: RemoteFiles, target: Path, advance: Advance, on_unchanged: Callable[[], None]
) -> Manifest:
    """Copy what is damaged or missing in the copy at `target` again."""
    manifest = Manifest.read(target)
    bar, damaged = _Bar(advance, manifest.totals["bytes"]), list[int]()
    for number, info in enumerate(manifest.parts):
        if not _is_complete(target, manifest, info):
            damaged.append(number)
        bar.complete(info)
    if not damaged and _has_top(target, manifest):
        on_unchanged()
        return manifest
    lost = sum(file.bytes for i in damaged for file in manifest.parts[i].files.values())
    bar = _Bar(advance, lost)
    with _work_beside(target) as new:
        for number in damaged:
            info = manifest.parts[number]
            _fetch(files, manifest, number, new, bar)
            if (target / info.name).exists():
                remove_part(target / info.name)
            commit(new / info.name, target / info.name)
            bar.complete(info)
        fetch_top(files, manifest, target)
        shutil.rmtree(new)
    return manifest


@contextmanager
def _work_beside(target: Path) -> Iterator[Path]:
    """Yield a directory for a copy of `target`, locked; it is kept if the copy is interrupted."""
    work = target.with_name(f".{target.name}.pull")
    with full_disk_explained(target.parent), DirectoryLock(work, shown=target):
        (work / "store").mkdir(exist_ok=True)
        yield work / "store"
    work.rmdir()


def _fetch(files: RemoteFiles, manifest: Manifest, number: int, new: Path, bar: _Bar) -> None:
    """Copy a part to `new`, unless an interrupted copy has done so."""
    info = manifest.parts[number]
    if not _is_complete(new, manifest, info):
        shutil.rmtree(new / info.name, ignore_errors=True)
        fetch_part(files, manifest, number, new, bar.add)


def _is_complete(directory: Path, manifest: Manifest, info: ShardInfo) -> bool:
    """Return whether a part has all its files, with their SHA-256."""
    listed = part_files(manifest, info)
    return _holds(directory / info.name / SHARD, part_json(manifest, info)) and all(
        is_intact(directory / name, file) for name, file in listed.items()
    )


def _has_top(directory: Path, manifest: Manifest) -> bool:
    """Return whether the files beside the manifest are intact."""
    return _holds(directory / SPEC, canonical_json(manifest.spec_json)) and all(
        is_intact(directory / name, file) for name, file in top_files(manifest).items()
    )


def _holds(path: Path, text: str) -> bool:
    """Return whether a file has this content."""
    content = text.encode()
    return size_of(path) == len(content) and path.read_bytes() == content


def _is_pulled(target: Path, text: bytes) -> bool:
    """Return whether the directory holds this store; raise StoreError if it holds anything else."""
    if os.path.ismount(target):
        raise StoreError(f"{target} is a mount point; give a directory in it")
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return False
    if (target / MANIFEST).is_file() and (target / MANIFEST).read_bytes() == text:
        return True
    raise StoreError(f"{target} exists and is not the store to pull; choose a new directory")
