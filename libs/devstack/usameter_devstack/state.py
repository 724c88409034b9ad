"""What is written down in the home: who owns it, what runs, and the ports that were used last."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec

from usameter_devstack.errors import AlreadyRunning, HomeUnusable


class ProcessRecord(msgspec.Struct, frozen=True):
    """A process, by pid and by the start that tells it from a later one with the same pid."""

    pid: int
    start: str


class ChildRecord(msgspec.Struct, frozen=True):
    """A child as it runs now. Order in the state file is order of start."""

    name: str
    process: ProcessRecord
    port: int | None
    restarts: int
    stop_signal: int
    stop_timeout_seconds: float


class StateRecord(msgspec.Struct, frozen=True):
    """The content of `<home>/state.json`.

    `supervisor` is None when the platform was stopped in order. Otherwise it may also be a dead one: check
    `processes.is_alive`.
    """

    supervisor: ProcessRecord | None = None
    # True between "everything is ready" and the beginning of the stop.
    ready: bool = False
    children: tuple[ChildRecord, ...] = ()
    # By name of child; kept after a stop, so that URLs stay the same over restarts.
    ports: dict[str, int] = {}


def read_state(home: Path) -> StateRecord:
    """The state; an empty one if there is none, or none that can be read (it is rewritten at every start)."""
    try:
        return msgspec.json.decode((home / "state.json").read_bytes(), type=StateRecord)
    except (OSError, msgspec.DecodeError):
        return StateRecord()


def write_state(home: Path, state: StateRecord) -> None:
    """Replace the state in one step: a reader sees the old or the new one."""
    write_private_file(home / "state.json", msgspec.json.format(msgspec.json.encode(state), indent=2))


def write_private_file(path: Path, content: bytes) -> None:
    """Replace a file in one step, readable by its owner only from its first byte on.

    Raises:
        HomeUnusable: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # dev.env and the secrets must not be empty after a power cut that the database survived.
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HomeUnusable(f"Cannot write {path}: {error.strerror}.") from error


class HomeLock:
    """Sole ownership of a home, held while entered; the kernel frees it when the holder dies."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._descriptor: int | None = None

    def __enter__(self) -> HomeLock:
        """Take it, or raise AlreadyRunning at once; it never waits."""
        path = self._home / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise HomeUnusable(f"Cannot write {path}: {error.strerror}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise AlreadyRunning(self._home, _holder(path)) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            # The file stays: removing it would let two starts lock two files of the same name.
            os.close(self._descriptor)
            self._descriptor = None


def _holder(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None
