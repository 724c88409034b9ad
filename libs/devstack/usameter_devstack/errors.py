"""What can go wrong while the platform runs on this machine.

    DevstackError
    ├── PortTaken            another program listens on a port that was asked for
    ├── AlreadyRunning       another supervisor owns this home
    ├── HomeUnusable         the home cannot be made, written or given to the servers' user
    ├── ConfigInvalid        an environment variable has a value that cannot be used
    └── StartFailed          a child died, or did not get ready, before the stack was up

Every sentence is meant for the person at the terminal: it says what to change. None holds a secret.
"""

from __future__ import annotations

from pathlib import Path

HTTP_PORT_VARIABLE = "USAMETER_HTTP_PORT"
HOME_VARIABLE = "USAMETER_HOME"


class DevstackError(Exception):
    """The platform cannot be run as asked; `str()` is the sentence to show."""


class PortTaken(DevstackError):
    """Something already listens on 127.0.0.1:`port`."""

    def __init__(self, port: int, what: str, *, variable: str | None = HTTP_PORT_VARIABLE) -> None:
        remedy = f"Stop it, or set {variable} to a free port" if variable else "Start again to use another port"
        super().__init__(f"Port {port} on 127.0.0.1, wanted for {what}, is taken by another program. {remedy}.")
        self.port = port
        self.what = what


class AlreadyRunning(DevstackError):
    """A live supervisor holds the lock of this home."""

    def __init__(self, home: Path, pid: int | None) -> None:
        who = f"pid {pid}" if pid is not None else "pid not yet known"
        super().__init__(
            f"Usameter is already running ({who}) in {home}. "
            f"Stop it with `usameter down`, or set {HOME_VARIABLE} to another directory."
        )
        self.home = home
        self.pid = pid


class HomeUnusable(DevstackError):
    """A directory or file of the home cannot be used; the sentence names it."""


class ConfigInvalid(DevstackError):
    """An environment variable cannot be used; the sentence names it and says what it takes."""


class StartFailed(DevstackError):
    """A child died, did not get ready in time, or a step of the start failed.

    Starting again is safe: everything that was started has been stopped, and no data is lost.
    """

    def __init__(self, name: str, reason: str, *, log_path: Path | None = None, log_tail: str = "") -> None:
        parts = [f"{name} {reason}."]
        if log_tail:
            parts.append(f"Its last words:\n{log_tail}")
        if log_path is not None:
            parts.append(f"Its log: {log_path}" if not log_tail else f"All of it: {log_path}")
        super().__init__("\n".join(parts))
        self.name = name
        self.reason = reason
        self.log_path = log_path
        self.log_tail = log_tail
