"""Join the shards of a store that an earlier version wrote to segments, in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.files import read_json
from nemo_kd.lock import DirectoryLock
from nemo_kd.store.manifest import MANIFEST, PACKING, SPEC, Manifest
from nemo_kd.store.ours import refuse_foreign
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.writer import StoreWriter


def pack(
    directory: str | Path,
    *,
    segment_bytes: int | None = None,
    on_segment: Callable[[int, int], None] | None = None,
    on_unchanged: Callable[[], None] = lambda: None,
) -> Manifest:
    """Join the shards of a finished store to segments of about `segment_bytes`.

    A store that has segments is left as it is, and `on_unchanged()` is called. If it is
    interrupted, the store is unfinished until `pack` is called again. `on_segment(done, total)` is
    called after each segment. Raises StoreError for a directory without a finished store, and for
    `segment_bytes` if the store has segments.
    """
    path = Path(directory)
    if not path.is_dir():
        raise StoreError(f"no store at {path}: no such directory")
    refuse_foreign(path)
    with DirectoryLock(path):
        if (path / PACKING).exists() and not (path / MANIFEST).exists():
            return _joined(path, 0, segment_bytes, on_segment)
        if not (path / MANIFEST).exists():
            raise StoreError(f"{path}: no finished store; run its dump again, which joins it")
        manifest = Manifest.read(path)
        if manifest.index is not None:
            if segment_bytes is not None:
                raise StoreError(
                    f"{path} has segments already; for others of {segment_bytes} bytes use "
                    f"`nemo-kd convert {path} NEW --segment-bytes {segment_bytes}`"
                )
            on_unchanged()
            return manifest
        return _joined(path, len(manifest.parts), segment_bytes, on_segment)


def _joined(
    path: Path,
    shards: int,
    segment_bytes: int | None,
    on_segment: Callable[[int, int], None] | None,
) -> Manifest:
    writer = StoreWriter(path, StoreSpec.from_json(read_json(path / SPEC)))
    writer.begin_joining(shards, segment_bytes)
    writer.join(on_segment=on_segment)
    return writer.publish()
