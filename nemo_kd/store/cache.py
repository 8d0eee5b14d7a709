"""A local cache of remote stores: the manifest when one is opened, each part when it is first read.

    <cache>/<last component of the URL>-<hash of the URL and the manifest>/
      manifest.json ... as in a store; a part is there once it has been read

The directory is opened like that of a local store, but only a URL that the user gave leads to it
and to the network. One process fetches a part, under a lock, while the others on all hosts that
share the cache wait for it.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nemo_kd.errors import NemoKDError
from nemo_kd.files import commit
from nemo_kd.lock import DirectoryLock, LockedError
from nemo_kd.store.manifest import MANIFEST, Manifest, ShardInfo
from nemo_kd.store.remote import RemoteFiles, is_url
from nemo_kd.store.schema import MAX_MANIFEST
from nemo_kd.store.transfer import fetch_part, fetch_top

CACHE = "NEMO_KD_CACHE"
_POLL = 0.1  # seconds


def cache_root() -> Path:
    """Return the directory of all cached stores."""
    if own := os.environ.get(CACHE):
        return Path(own).absolute()
    general = os.environ.get("XDG_CACHE_HOME")
    return (Path(general) if general else Path.home() / ".cache") / "nemo-kd"


class Origin:
    """Where a store comes from: a directory, or a URL and the directory of its cache.

    Fetches the manifest of a URL, and the other small files if the cache lacks them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        """As given; opening it again gives the same store."""
        self.directory = Path(path)
        self.url: str | None = None
        self._fetched: set[int] = set()
        self._ahead: threading.Thread | None = None
        self._opened: tuple[int, RemoteFiles] | None = None
        if isinstance(path, str) and is_url(path):
            self.url = path
            self.directory = _cached(self._files(path))

    def __str__(self) -> str:
        return self.url or str(self.directory)

    def lacks(self, part: ShardInfo) -> bool:
        """Return whether a part of a remote store has not been fetched yet."""
        return self.url is not None and not (self.directory / part.name).exists()

    def fetch(self, manifest: Manifest, number: int) -> None:
        """Fetch a part of a remote store if it is missing, and the next one in the background."""
        if self.url is None or number in self._fetched:
            return
        self._fetch(manifest, number)
        self._fetched.add(number)
        busy = self._ahead is not None and self._ahead.is_alive()
        if not busy and number + 1 < len(manifest.parts):
            self._ahead = threading.Thread(
                target=self._fetch_ahead, args=(manifest, number + 1), daemon=True
            )
            self._ahead.start()

    def wait(self) -> None:
        """Wait until nothing is being fetched in the background."""
        if self._ahead is not None:
            self._ahead.join()

    def _fetch_ahead(self, manifest: Manifest, number: int) -> None:
        with suppress(NemoKDError, OSError):  # reported when the part is read
            self._fetch(manifest, number)

    def _fetch(self, manifest: Manifest, number: int) -> None:
        info, url = manifest.parts[number], self.url
        if url is not None and self.lacks(info):
            part = self.directory / info.name
            _once(part, lambda: fetch_part(self._files(url), manifest, number, self.directory))

    def _files(self, url: str) -> RemoteFiles:
        """Return the files below the URL; a file system of fsspec is of no use after a fork."""
        process = os.getpid()
        if self._opened is None or self._opened[0] != process:
            self._opened = process, RemoteFiles(url)
        return self._opened[1]


def _cached(files: RemoteFiles) -> Path:
    """Return the directory of the store that is at a URL now, opened in the cache."""
    text = files.read(MANIFEST, MAX_MANIFEST)
    key = hashlib.sha256(f"{files.url}\n".encode() + text).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", files.url.rpartition("/")[2])[:64]
    directory = cache_root() / f"{name}-{key}"
    _once(directory, lambda: _open(files, text, directory))
    return directory


def _open(files: RemoteFiles, text: bytes, directory: Path) -> None:
    """Fetch the small files of a store to a temporary directory, and rename it."""
    work = directory.with_name(f".{directory.name}.tmp")
    work.mkdir(exist_ok=True)
    (work / MANIFEST).write_bytes(text)
    fetch_top(files, Manifest.read(work), work)
    commit(work, directory)


def _once(path: Path, make: Callable[[], None]) -> None:
    """Call `make` to create `path` if it does not exist, in one process while others wait."""
    lock = path.parent / "locks" / path.name
    while not path.exists():
        try:
            with DirectoryLock(lock):
                if not path.exists():
                    make()
        except LockedError:
            time.sleep(_POLL)
