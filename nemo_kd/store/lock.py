"""One writer at a time in a store's directory, on any file system and over any number of hosts.

The lock is a file that one writer creates (`O_EXCL`) and touches every few seconds. It says who
has it. A lock is dead when its process is gone, which only its own host can see, or when it has
not been touched for `STALE` seconds, by the clock of the file system. Nothing depends on `flock`,
which NFS and Lustre may not carry from host to host.

A dead lock is taken over by replacing it: whoever creates the file that is named after it, of
which there is one, may. A writer that lost its lock nevertheless (it was stopped for minutes, say)
notices it, at the latest when it asks `check`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from nemo_kd.errors import StoreError
from nemo_kd.files import full_disk_explained

LOCK = ".lock"
HEARTBEAT = 10.0
"""Seconds between two touches."""
STALE = 120.0
"""Seconds without a touch after which a lock is dead. Clients of NFS see one a minute late."""
_POLL = 0.5


class LockedError(StoreError):
    """Another process writes to the directory."""


@dataclass(frozen=True)
class Holder:
    """Who has a lock."""

    host: str = "an unknown host"
    pid: int = 0
    since: str = "an unknown time"
    boot: str = ""
    """The host's boot and the process's namespace: where equal, `pid` can be looked up."""
    started: str = ""
    """When the process started, in the kernel's own count: a pid is used again."""
    token: str = ""

    @classmethod
    def this_process(cls) -> Holder:
        now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        pid = os.getpid()
        token = secrets.token_hex(8)
        return cls(socket.gethostname(), pid, now, _boot(), _started(pid), token)

    @classmethod
    def read(cls, text: str) -> Holder:
        """What a lock's file says; of one that is just being written, nothing."""
        try:
            value = json.loads(text)
            return cls(**{field.name: value[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError):
            return cls()

    def is_gone(self) -> bool | None:
        """Whether its process has ended; None where only its own host could say."""
        if not self.started or self.boot != _boot():
            return None
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


class DirectoryLock:
    """A context within which no other process writes to `directory`, which is made if need be.

    Errors: LockedError, naming host and process, where another one has it. Of a lock of another
    host, which cannot be asked, a touch is waited for; if none comes, the lock is taken over.
    """

    def __init__(
        self, directory: str | Path, heartbeat: float = HEARTBEAT, stale: float = STALE
    ) -> None:
        self.directory = Path(directory)
        self.path = self.directory / LOCK
        self.heartbeat, self.stale = heartbeat, stale
        self.holder = Holder.this_process()
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="store lock", daemon=True)

    def __enter__(self) -> DirectoryLock:
        try:
            with full_disk_explained(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._acquire()
        except OSError as error:
            raise StoreError(
                f"{self.directory} cannot be written to ({error.strerror}); choose another "
                "directory"
            ) from error
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):  # left behind it is as a killed process's
            if self._is_mine():
                self.path.unlink()

    def check(self) -> None:
        """StoreError where another process has taken the lock over, or removed it."""
        if self.lost or not self._is_mine():
            there = self._read()
            raise StoreError(
                f"{self.directory}: this process has lost its lock, "
                f"{f'which {there} has now' if there else 'which was removed'}; it stops, so that "
                "two do not write there"
            )

    def _acquire(self) -> None:
        while not self._create(self.path):
            there = self._read()
            if there is not None and self._is_dead(there):
                self._take_over(there)
                if self._is_mine():
                    return

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(self._text())
        return True

    def _text(self) -> str:
        return json.dumps(asdict(self.holder))

    def _read(self, path: Path | None = None) -> Holder | None:
        try:
            return Holder.read((path or self.path).read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def _is_mine(self) -> bool:
        return self._read() == self.holder

    # --- of another's lock ---------------------------------------------------------------------

    def _is_dead(self, there: Holder) -> bool:
        """Whether the lock that `there` has may be taken over. LockedError if it is alive."""
        gone = there.is_gone()
        if gone is not None:
            if gone:
                return True
            raise LockedError(self._refusal(there))
        touched = self._touched()
        # At least until the next touch is due: hosts may date files by clocks of their own.
        left = max(self.stale - self._age(), 1.5 * self.heartbeat)
        end, said = time.monotonic() + left, False
        while time.monotonic() < end:
            time.sleep(min(_POLL, self.heartbeat))
            now = self._touched()
            if now is None or self._read() != there:
                return False  # released, or another's now: from the beginning
            if now != touched:
                raise LockedError(self._refusal(there))
            if not said:
                _say(
                    f"{self.directory} is locked by {there}; if that job was killed, this one "
                    f"takes the lock over in {left:.0f} s"
                )
                said = True
        return True

    def _touched(self) -> int | None:
        """When the lock was last touched, in ns; opened for it, so that NFS asks its server."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _age(self, path: Path | None = None) -> float:
        """Seconds since the last touch, by the clock that dates files there."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory, prefix=f"{LOCK}.") as file:
                now = os.fstat(file.fileno()).st_mtime_ns
                return (now - (path or self.path).stat().st_mtime_ns) / 1e9
        except FileNotFoundError:
            return 0.0

    def _take_over(self, dead: Holder) -> None:
        """Replace the lock of `dead` by one's own, unless another is doing that already."""
        claim = self.directory / f"{LOCK}.after.{dead.token or 'unknown'}"
        if not self._create(claim):
            if self._age(claim) > self.stale:  # whoever made it was killed in between
                claim.unlink(missing_ok=True)
            time.sleep(min(_POLL, self.heartbeat))
            return
        if self._read() == dead:
            _say(f"{self.directory}: the lock of {dead} is taken over, it has ended")
            os.replace(claim, self.path)
        else:
            claim.unlink(missing_ok=True)

    def _refusal(self, there: Holder) -> str:
        return (
            f"{self.directory} is being written by another job: {there}; wait until it has ended, "
            "stop it, or choose another directory"
        )

    # --- of one's own --------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat):
            with suppress(OSError):  # a file system that does not answer for a moment
                if not self._is_mine():
                    self.lost = True
                    return
                os.utime(self.path)


def _boot() -> str:
    """What this host's boot and this process's namespace are called; empty where it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot; empty where there is none, or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
