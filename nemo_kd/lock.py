"""A lock on a directory: one writer at a time, on any file system, across hosts.

The lock is a file that names its holder. The holder creates it (`O_EXCL`) and touches it every few
seconds. A lock is dead if its process has ended, which can be determined only on the same host, or
if it has not been touched for `STALE` seconds by the file system's clock. `flock` is not used: NFS
and Lustre may not propagate it between hosts.

To take over a dead lock, a process must first create a claim file named after that lock, which only
one process can do. A holder that nevertheless loses its lock, for example because it was suspended
for minutes, finds out when it calls `check`.
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
from nemo_kd.paths import dangling_link
from nemo_kd.visible import visible

LOCK = ".lock"
HEARTBEAT = 10.0
"""Seconds between touches."""
STALE = 120.0
"""Seconds without a touch after which a lock is dead; NFS clients may see touches a minute late."""
_POLL = 0.5
ATTEMPTS = 1000


class LockedError(StoreError):
    """Error raised when another process is writing to the directory."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str = "an unknown host"
    pid: int = 0
    since: str = "an unknown time"
    boot: str = ""
    """Boot id of the host and PID namespace; `pid` can be looked up only where both match."""
    started: str = ""
    """Start time in kernel ticks, to distinguish the process from a later one with the same pid."""
    token: str = ""

    @classmethod
    def this_process(cls) -> Holder:
        now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        pid = os.getpid()
        token = secrets.token_hex(8)
        return cls(socket.gethostname(), pid, now, _boot(), _started(pid), token)

    @classmethod
    def read(cls, text: str) -> Holder:
        """Parse a lock file; return a `Holder` with empty fields while it is being written."""
        try:
            value = json.loads(text)
            return cls(**{field.name: value[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError):
            return cls()

    def is_gone(self) -> bool | None:
        """Return whether the process has ended; None if this host cannot tell."""
        if not self.started or self.boot != _boot():
            return None
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


class DirectoryLock:
    """Context manager that keeps other processes from writing to `directory`.

    Creates the directory if it is missing. If another process holds the lock, raises LockedError
    with its host and pid. If that process is on another host, first waits for it to touch the lock,
    and takes the lock over if it does not. Messages name `shown`, by default the directory.
    """

    def __init__(
        self,
        directory: str | Path,
        heartbeat: float = HEARTBEAT,
        stale: float = STALE,
        shown: str | Path | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.shown = self.directory if shown is None else shown
        self.path = self.directory / LOCK
        self.heartbeat, self.stale = heartbeat, stale
        self.holder = Holder.this_process()
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="store lock", daemon=True)

    def __enter__(self) -> DirectoryLock:
        try:
            with full_disk_explained(self.directory):
                self._acquire()
        except OSError as error:
            if link := dangling_link(self.directory):
                raise StoreError(
                    f"{self.shown} cannot be created: {link}; create it, or choose another "
                    "directory"
                ) from error
            raise StoreError(
                f"{self.shown} is not writable ({error.strerror}); choose another directory"
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
        with suppress(OSError):  # a leftover lock is treated like that of a killed process
            if self._is_mine():
                self.path.unlink()

    def check(self) -> None:
        """Raise StoreError if another process has taken over or removed the lock."""
        if self.lost or not self._is_mine():
            there = self._read()
            raise StoreError(
                f"{self.shown}: this process has lost its lock, "
                f"{f'now held by {there}' if there else 'which was removed'}; stopping, so that no "
                "two processes write to the directory"
            )

    def _acquire(self) -> None:
        for attempt in range(ATTEMPTS):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                if self._try():
                    return
            except FileNotFoundError:  # the holder removed the directory together with the lock
                if attempt == ATTEMPTS - 1:
                    raise
        raise LockedError(f"{self.shown}: its lock changes hands all the time; try again later")

    def _try(self) -> bool:
        """Try once to create the lock or take over a dead one; return whether it is ours."""
        if self._create(self.path):
            return True
        there = self._read()
        if there is not None and self._is_dead(there):
            self._take_over(there)
            return self._is_mine()
        return False

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(self._text())
        except OSError:
            path.unlink(missing_ok=True)  # without its text it would look like another's lock
            raise
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

    # --- another process's lock ----------------------------------------------------------------

    def _is_dead(self, there: Holder) -> bool:
        """Return whether the lock held by `there` may be taken over.

        Returns False if the lock has changed meanwhile. Raises LockedError if the holder is alive.
        """
        gone = there.is_gone()
        if gone is not None:
            if gone:
                return True
            raise LockedError(self._refusal(there))
        touched = self._touched()
        # Wait at least until the next touch is due: hosts may timestamp files by their own clocks.
        left = max(self.stale - self._age(), 1.5 * self.heartbeat)
        end, announced = time.monotonic() + left, False
        while time.monotonic() < end:
            time.sleep(min(_POLL, self.heartbeat))
            now = self._touched()
            if now is None or self._read() != there:
                return False  # released, or held by another process: try again
            if now != touched:
                raise LockedError(self._refusal(there))
            if not announced:
                _say(
                    f"{self.shown} is locked by {there}; if that job was killed, this one "
                    f"takes over the lock in {left:.0f} s"
                )
                announced = True
        return True

    def _touched(self) -> int | None:
        """Return the time of the last touch in ns; None if there is no lock.

        Opening the file makes an NFS client query its server instead of its cache.
        """
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _age(self, path: Path | None = None) -> float:
        """Return the seconds since the last touch, by the file system's clock."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory, prefix=f"{LOCK}.") as file:
                now = os.fstat(file.fileno()).st_mtime_ns
                return (now - (path or self.path).stat().st_mtime_ns) / 1e9
        except FileNotFoundError:
            return 0.0

    def _take_over(self, dead: Holder) -> None:
        """Replace the lock of `dead`, unless another process is already doing so."""
        claim = self.directory / f"{LOCK}.after.{dead.token or 'unknown'}"
        if not self._create(claim):
            if self._age(claim) > self.stale:  # its creator was killed
                claim.unlink(missing_ok=True)
            time.sleep(min(_POLL, self.heartbeat))
            return
        if self._read() == dead:
            _say(f"{self.shown}: taking over the lock of {dead}, which has ended")
            os.replace(claim, self.path)
        else:
            claim.unlink(missing_ok=True)

    def _refusal(self, there: Holder) -> str:
        return (
            f"{self.shown} is being written by another job: {there}; wait until it ends, stop "
            "it, or choose another directory"
        )

    # --- this process's lock -------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat):
            with suppress(OSError):  # the file system may not respond for a moment
                if not self._is_mine():
                    self.lost = True
                    return
                os.utime(self.path)


def _boot() -> str:
    """Return the host's boot id and this process's PID namespace; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return a process's start time in ticks since boot; empty if not running or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
