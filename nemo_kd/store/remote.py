"""Files of a store behind a URL, read and written through fsspec; every transfer is retried.

Credentials and endpoints come from the environment (`AWS_PROFILE`, `AWS_ENDPOINT_URL`,
`GOOGLE_APPLICATION_CREDENTIALS`, `MSC_CONFIG`, ...) as fsspec's file systems find them; a URL that
contains some is refused, since URLs appear in messages and in the cache.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nemo_kd.errors import NemoKDError, StoreError
from nemo_kd.extras import install
from nemo_kd.files import full_disk_explained
from nemo_kd.store.manifest import FileInfo
from nemo_kd.store.parts import is_intact

T = TypeVar("T")
Progress = Callable[[int], None]
"""Function of the number of bytes that have been transferred since the last call."""
ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts, doubled each time
PACKAGES = {
    "gs": install("remote", "gcsfs"),
    "gcs": install("remote", "gcsfs"),
    "msc": install("remote", "multi-storage-client"),
}
INSTALL = install("remote")
LOST_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors that another attempt does not mend."""
CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
"""Errors of botocore that another attempt does not mend."""


class ArrivalError(StoreError):
    """A file that arrived with another size or SHA-256 than the manifest lists."""


def is_url(path: str | Path) -> bool:
    """Return whether a store's path is a URL, such as `s3://bucket/store`."""
    return isinstance(path, str) and "://" in path


class RemoteFiles:
    """The files below a URL, by their paths relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        _refuse_secrets(self.url)
        self._system, self._root = _file_system(self.url)

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a file of at most `limit` bytes."""

        def attempt() -> bytes:
            path = self._path(name)
            size = self._system.size(path)
            if size is not None and size > limit:
                raise StoreError(f"{self.url}/{name}: {size} bytes where at most {limit} are read")
            return bytes(self._system.cat_file(path))

        return self._retried(name, attempt)

    def create(self) -> None:
        """Create the directory, where the file system has directories."""
        self._retried("", lambda: self._system.makedirs(self._root, exist_ok=True))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        self._retried(name, lambda: self._system.pipe_file(self._path(name), content))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._retried(name, lambda: self._system.rm_file(self._path(name)))

    def sizes(self) -> dict[str, int]:
        """Return the size of every file below the URL, by relative path."""

        def attempt() -> dict[str, int]:
            self._system.invalidate_cache()
            try:
                found = self._system.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            start = len(self._root) + 1
            return {path[start:]: int(entry["size"]) for path, entry in found.items()}

        return self._retried("", attempt)

    def download(
        self, files: Mapping[str, FileInfo], directory: Path, progress: Progress = lambda _: None
    ) -> None:
        """Copy files to `directory` under the same names, at the same time.

        Sizes and SHA-256 are compared on arrival. Files that are there already are not copied.
        Raises StoreError if one cannot be read, or differs at every attempt.
        """

        def fetch(name: str) -> None:
            target, info = directory / name, files[name]
            if is_intact(target, info):
                return
            size = self._system.size(self._path(name))
            if size is not None and size != info.bytes:
                raise ArrivalError(f"it has {size} bytes, the manifest lists {info.bytes}")
            with full_disk_explained(directory):
                self._system.get_file(self._path(name), str(target), callback=_counter(progress))
            if not is_intact(target, info):
                raise ArrivalError("it has another SHA-256 than in the manifest")

        for name in files:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        _at_once(lambda name: self._retried(name, lambda: fetch(name)), files)

    def upload(
        self, names: list[str], directory: Path, progress: Progress = lambda _: None
    ) -> None:
        """Copy files of `directory` to the same names below the URL, at the same time."""

        def send(name: str) -> None:
            source, target = str(directory / name), self._path(name)
            self._system.put_file(source, target, callback=_counter(progress))

        for parent in {self._path(name).rpartition("/")[0] for name in names}:
            self._retried("", partial(self._system.makedirs, parent, exist_ok=True))
        _at_once(lambda name: self._retried(name, lambda: send(name)), names)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _retried(self, name: str, attempt: Callable[[], T]) -> T:
        """Return the result of `attempt`, repeated with growing waits; its last error is final."""
        import tenacity

        where = f"{self.url}/{name}" if name else self.url
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(FIRST_WAIT, LONGEST_WAIT)
            + tenacity.wait_random(0, FIRST_WAIT),
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except ArrivalError as error:
            raise StoreError(
                f"{where}: {error}; it is damaged, or another store was written there: push "
                "the store again to a new URL"
            ) from error
        except NemoKDError:
            raise
        except Exception as error:
            raise StoreError(f"{where}: {_what(error)}; {_remedy(error)}") from error


def _refuse_secrets(url: str) -> None:
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise StoreError(
            f"{shown}: credentials and queries in a URL are refused, because they would appear in "
            "messages; set them in the environment"
        )


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path there."""
    protocol = url.partition("://")[0]
    command = PACKAGES.get(protocol, INSTALL)
    try:
        import fsspec.asyn
        import fsspec.core
        import tenacity  # noqa: F401 (missing packages are reported before anything is copied)

        thread = fsspec.asyn.iothread[0]
        if thread is not None and not thread.is_alive():  # of the process that forked this one
            fsspec.asyn.reset_lock()
        system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise StoreError(f"{url}: {error.name or error} is not installed: {command}") from error
    except ValueError as error:  # of fsspec, for a protocol that no installed package provides
        known = f"{protocol}:// is not installed: {command}" if protocol in PACKAGES else str(error)
        raise StoreError(f"{url}: {known}") from error
    except Exception as error:
        raise StoreError(f"{url}: {_what(error)}; {_remedy(error)}") from error
    return system, root.rstrip("/")


def _at_once(function: Callable[[str], None], names: Iterable[str]) -> None:
    """Call a function for each name, all at the same time; raise an error once all have ended.

    The lists of fsspec are not used: at an error they leave the other copies running, which would
    write to the files of the next attempt. The threads do not keep a process from being stopped.
    """
    errors: list[BaseException] = []

    def run(name: str) -> None:
        try:
            function(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _counter(progress: Progress) -> Any:
    """Return a callback of fsspec that reports the bytes of a file to `progress`."""
    from fsspec.callbacks import Callback

    class Bytes(Callback):
        def relative_update(self, inc: int = 1) -> None:
            progress(inc)

    return Bytes()


def _may_pass(error: BaseException) -> bool:
    """Return whether another attempt may succeed."""
    if isinstance(error, ArrivalError):
        return True
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    lost = (*LOST_FOR_GOOD, NemoKDError, ImportError)
    named = type(error).__name__ in CREDENTIALS
    return isinstance(error, Exception) and not (full or named or isinstance(error, lost))


def _what(error: BaseException) -> str:
    """Describe an error in one line, without the queries of signed URLs."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\?\S+", "?...", text)[:300]


def _remedy(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "check the URL; a store has been pushed completely once it has a manifest.json"
    if isinstance(error, PermissionError) or type(error).__name__ in CREDENTIALS:
        return "check the credentials in the environment"
    return f"failed {ATTEMPTS} times; check the network and the server, then run it again"
