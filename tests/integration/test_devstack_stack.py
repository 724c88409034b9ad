"""The whole stack as `usameter up` runs it, with stand-ins for the services and real servers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from usameter_devstack import control
from usameter_devstack.config import StackConfig
from usameter_devstack.credentials import read_dev_env, with_role, write_dev_env
from usameter_devstack.errors import ConfigInvalid
from usameter_devstack.events import ChildDied, ChildRestarted, Event, StackReady, StartAborted
from usameter_devstack.ports import free_port
from usameter_devstack.processes import process_start
from usameter_devstack.stack import SERVICES, Stack
from usameter_devstack.state import read_state

# Keeps the contract between the stack and a service, and nothing else: `bootstrap` prints a key (and refuses
# one it does not know), `serve` answers health checks; the table is made by a migration.
SERVICE = """
import asyncio, json, os, sys
import asyncpg

NAME = __spec__.parent.removeprefix("usameter_")

async def bootstrap():
    connection = await asyncpg.connect(os.environ["USAMETER_DATABASE_URL"])
    if "--api-key-env" in sys.argv:
        key = os.environ[sys.argv[sys.argv.index("--api-key-env") + 1]]
        if not await connection.fetchval("SELECT 1 FROM identity.key WHERE key = $1", key):
            sys.exit("unknown key")
    else:
        key = "usa_" + os.urandom(8).hex()
        await connection.execute("INSERT INTO identity.key VALUES ($1)", key)
    print(json.dumps({"org_id": "org", "api_key": key}))

async def serve():
    import grpc.aio
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    assert "DATABASE_URL" not in os.environ
    connection = await asyncpg.connect(os.environ["USAMETER_DATABASE_URL"])
    assert await connection.fetchval("SELECT current_user") == f"usameter_{NAME}"
    assert ("USAMETER_CRON_SECRET" in os.environ) == (NAME == "ingest")
    assert os.environ["USAMETER_INTERNAL_TOKEN"]
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(os.environ["USAMETER_LISTEN"])
    await server.start()
    await server.wait_for_termination()

asyncio.run(globals()[sys.argv[1]]())
"""
MIGRATION = """
CREATE TABLE {name}.key (key text);
GRANT SELECT, INSERT ON {name}.key TO usameter_{name};
"""
GATEWAY = """
import http.server, os
assert "USAMETER_INTERNAL_TOKEN" not in os.environ

class Edge(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

host, port = os.environ["USAMETER_LISTEN"].split(":")
assert all(os.environ[f"USAMETER_{peer}_ADDR"] for peer in ("IDENTITY", "INGEST", "QUOTA", "BILLING"))
http.server.HTTPServer((host, int(port)), Edge).serve_forever()
"""


def stand_ins(directory: Path) -> Path:
    for name in (*SERVICES, "gateway"):
        package = directory / f"usameter_{name}"
        (package / "migrations").mkdir(parents=True)
        (package / "migrations" / "0001_create_key.sql").write_text(MIGRATION.format(name=name))
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(GATEWAY if name == "gateway" else SERVICE)
    return directory


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_ins(tmp_path_factory.mktemp("modules"))


def stack_config(home: Path, modules: Path) -> StackConfig:
    environment = {"PYTHONPATH": os.pathsep.join(part for part in (str(modules), os.environ.get("PYTHONPATH")) if part)}
    return StackConfig(home=home, http_port=0, durable=False, service_environment=environment)


async def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.01)


async def test_stack_starts_survives_a_killed_postgres_and_keeps_key_ports_and_data(
    tmp_path: Path, modules: Path
) -> None:
    config = stack_config(tmp_path / "home", modules)
    events: list[Event] = []
    async with Stack(config, report=events.append) as stack:
        first = dict(stack.environment)
        assert read_dev_env(config.dev_env_path) == first
        assert config.dev_env_path.stat().st_mode & 0o777 == 0o600
        assert (config.home / "secrets.json").stat().st_mode & 0o777 == 0o600
        assert set(first) == {
            "USAMETER_URL",
            "USAMETER_API_KEY",
            "USAMETER_CRON_SECRET",
            "USAMETER_DATABASE_URL",
            "USAMETER_REDIS_URL",
            *(f"USAMETER_{service.upper()}_ADDR" for service in SERVICES),
        }
        assert isinstance(events[-1], StackReady)
        for secret in ("USAMETER_API_KEY", "USAMETER_CRON_SECRET"):
            assert first[secret] not in repr(events)
            assert not any(first[secret] in log.read_text() for log in (config.home / "logs").iterdir())

        os.kill(stack.supervisor.pid("postgres"), signal.SIGKILL)
        await until(lambda: any(isinstance(event, ChildRestarted) for event in events))
        died = [event for event in events if isinstance(event, ChildDied)]
        assert [(event.name, event.reason) for event in died] == [("postgres", "was killed by SIGKILL")]
        connection = await asyncpg.connect(first["USAMETER_DATABASE_URL"])
        assert await connection.fetchval("SELECT key FROM identity.key") == first["USAMETER_API_KEY"]
        await connection.close()
    async with Stack(config, report=events.append) as stack:
        assert stack.environment == first


async def test_detached_stack_is_seen_by_status_and_ended_by_stop(
    tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    config = StackConfig(home=tmp_path / "home", http_port=port)
    python_path = stack_config(tmp_path, modules).service_environment["PYTHONPATH"]
    monkeypatch.setenv("PYTHONPATH", python_path)
    events: list[Event] = []
    assert not control.status(config).ready
    assert await asyncio.to_thread(control.stop, config, events.append) is False
    try:
        assert await asyncio.to_thread(control.start_detached, config, events.append) == 0, events
        assert isinstance(events[-1], StackReady)
        status = control.status(config)
        assert (status.ready, status.url) == (True, f"http://127.0.0.1:{port}")
        assert [child.name for child in status.children] == ["postgres", "valkey", *SERVICES, "gateway"]
        assert all(child.alive for child in status.children)

        again: list[Event] = []
        assert await asyncio.to_thread(control.start_detached, config, again.append) == 1
        assert isinstance(again[-1], StartAborted)
        assert f"already running (pid {status.supervisor_pid})" in again[-1].sentence

        other = StackConfig(home=tmp_path / "other", http_port=port)
        assert await asyncio.to_thread(control.start_detached, other, again.append) == 1
        assert isinstance(again[-1], StartAborted)
        assert f"Port {port} on 127.0.0.1" in again[-1].sentence
        assert "USAMETER_HTTP_PORT" in again[-1].sentence
    finally:
        assert await asyncio.to_thread(control.stop, config, events.append) is True
    assert control.status(config).children == ()
    assert all(process_start(child.pid) is None for child in status.children)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
async def test_ctrl_c_stops_in_order_and_a_killed_supervisor_leaves_nothing(tmp_path: Path, modules: Path) -> None:
    config = stack_config(tmp_path / "home", modules)
    assert await code_after(signal.SIGINT, config) == 0
    assert await code_after(signal.SIGKILL, config) == -signal.SIGKILL


async def code_after(number: signal.Signals, config: StackConfig) -> int:
    """Start the stack, send its supervisor a signal, and see everything end within seconds."""
    environment = os.environ | config.to_environment() | dict(config.service_environment)
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "usameter_devstack", env=environment)
    try:
        await until(lambda: read_state(config.home).ready)
        children = read_state(config.home).children
        process.send_signal(number)
        code = await asyncio.wait_for(process.wait(), 15)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    await until(lambda: all(process_start(child.process.pid) is None for child in children), seconds=5)
    return code


async def test_failing_migration_is_told_with_its_last_words_and_everything_is_stopped(
    tmp_path: Path, modules: Path
) -> None:
    broken = stand_ins(tmp_path / "modules")
    (broken / "usameter_quota" / "migrations" / "0001_create_key.sql").write_text("SELECT limit_value")
    events: list[Event] = []
    config = stack_config(tmp_path / "home", broken)
    assert await asyncio.to_thread(run_in_a_loop_of_its_own, config, events) == "StartFailed"
    assert read_state(config.home).children == ()


def run_in_a_loop_of_its_own(config: StackConfig, events: list[Event]) -> str:
    async def run() -> None:
        await Stack(config, report=events.append).run()

    try:
        asyncio.run(run())
    except Exception as error:
        assert "migrate exited with code 1" in str(error)
        assert 'quota: 0001_create_key.sql: column "limit_value" does not exist' in str(error)
        return type(error).__name__
    return "started"


def test_config_says_which_variable_is_wrong() -> None:
    config = StackConfig.from_environment({"USAMETER_HOME": "", "DATABASE_URL": ""})
    assert (config.home, config.http_port, config.database_url) == (Path.cwd() / ".usameter", 8080, None)
    assert StackConfig.from_environment(config.to_environment()) == config
    for port in ("http", "-1", "65536", "8080 "):
        with pytest.raises(ConfigInvalid, match="USAMETER_HTTP_PORT"):
            StackConfig.from_environment({"USAMETER_HTTP_PORT": port})
    with pytest.raises(ConfigInvalid, match="DATABASE_URL") as caught:
        StackConfig.from_environment({"DATABASE_URL": "mysql://user:secret@host/db"})
    assert "secret" not in str(caught.value)


def test_dev_env_can_be_sourced_by_a_shell(tmp_path: Path) -> None:
    values = {"A": "plain", "B": "postgresql://u:p@h/d?a=b&c=$d", "C": 'it\'s "quoted"'}
    write_dev_env(tmp_path / "dev.env", values)
    assert read_dev_env(tmp_path / "dev.env") == values
    script = '. "$1"; printf "%s\\n" "$A" "$B" "$C"'
    shell = subprocess.run(
        ["/bin/sh", "-c", script, "sh", str(tmp_path / "dev.env")], check=True, capture_output=True, text=True
    )
    assert shell.stdout.splitlines() == list(values.values())


@pytest.mark.parametrize(
    ("url", "password", "expected"),
    [
        ("postgresql://postgres@127.0.0.1:5/x", None, "postgresql://usameter_quota@127.0.0.1:5/x"),
        ("postgresql://a:b@h/x?sslmode=require", "p@/", "postgresql://usameter_quota:p%40%2F@h/x?sslmode=require"),
        ("postgresql:///x?host=/run", None, "postgresql://usameter_quota@/x?host=/run"),
    ],
)
def test_role_replaces_the_login_of_a_url_and_nothing_else(url: str, password: str | None, expected: str) -> None:
    assert with_role(url, "usameter_quota", password) == expected
