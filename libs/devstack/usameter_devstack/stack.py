"""The whole platform on one machine: both servers, migrations, a first key, and every service."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import TracebackType
from typing import TypeVar

import msgspec

from usameter_core.restarts import RestartPolicy
from usameter_devstack.child import ChildSpec, run_to_end
from usameter_devstack.config import StackConfig
from usameter_devstack.credentials import (
    Secrets,
    load_or_make_secrets,
    read_dev_env,
    with_role,
    write_dev_env,
)
from usameter_devstack.errors import StartFailed
from usameter_devstack.events import Report, StackReady, StepFinished, StepStarted
from usameter_devstack.ports import LOOPBACK, check_port, claim_port, free_ports
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_devstack.probes import grpc_probe, http_probe
from usameter_devstack.supervisor import Supervisor
from usameter_devstack.valkey import EmbeddedValkey

DATABASE = "usameter"
ORGANIZATION = "demo"
# In order of the call graph, callees first: they are stopped in the reverse order.
SERVICES = ("identity", "quota", "ingest", "billing")
_API_KEY = "USAMETER_API_KEY"
_MIGRATE_TIMEOUT_SECONDS = 300.0
_BOOTSTRAP_TIMEOUT_SECONDS = 60.0

# The administrator's URLs and everybody's secrets stop here, also where the caller has sourced dev.env: a
# service sees what it is given below, and no schema but its own.
_NOT_INHERITED = frozenset(
    {
        "DATABASE_URL",
        "REDIS_URL",
        _API_KEY,
        "USAMETER_CRON_SECRET",
        "USAMETER_DATABASE_URL",
        "USAMETER_INTERNAL_TOKEN",
        "USAMETER_MIGRATE_DATABASE_URL",
        "USAMETER_REDIS_URL",
        "USAMETER_ROLE_PASSWORD",
        "USAMETER_URL",
    }
)

_T = TypeVar("_T")


class _Bootstrapped(msgspec.Struct, frozen=True):
    org_id: str
    api_key: str


class Stack:
    """The platform, running while entered; `environment` is then what `dev.env` holds.

    For tests (`async with Stack(config, report=…) as stack`), and for `control`, which adds the signals.
    Entering fails with a DevstackError, and has then stopped whatever it had started.
    """

    def __init__(self, config: StackConfig, *, report: Report, policy: RestartPolicy | None = None) -> None:
        self.config = config
        self.supervisor = Supervisor(config.home, report=report, policy=policy)
        self.environment: dict[str, str] = {}
        self._report = report
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Stack:
        async with AsyncExitStack() as resources:
            await resources.enter_async_context(self.supervisor)
            await self._start()
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    async def run(self) -> int:
        """Start, serve until `supervisor.request_stop()`, stop; the exit code.

        A stop requested during the start cancels the start; that is no error.

        Raises:
            DevstackError: It could not be started; nothing runs any more.
        """
        async with self.supervisor:
            start = asyncio.create_task(self._start())
            stop = asyncio.create_task(self.supervisor.run())
            try:
                await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
                if start.done():
                    start.result()
                    return await stop
                return stop.result()
            finally:
                start.cancel()
                stop.cancel()
                await asyncio.gather(start, stop, return_exceptions=True)

    async def _start(self) -> None:
        began = time.monotonic()
        secrets = load_or_make_secrets(self.config.home)
        ports = self._choose_ports()
        database_url, redis_url = await self._start_servers(ports)
        await self._step("migrate", self._migrate(database_url, secrets))
        environments = {
            service: self._service_environment(service, ports, database_url, redis_url, secrets) for service in SERVICES
        }
        # The key needs identity's tables and not its server, so both are under way at once. So are all
        # children: each can wait for its peers, as it must on Kubernetes, and the imports fill all cores.
        services = [_service_spec(self.config, name, ports[name], environments[name]) for name in SERVICES]
        async with _together() as tasks:
            tasks.create_task(self.supervisor.start(*services, self._gateway_spec(ports)))
            key = tasks.create_task(self._step("bootstrap", self._bootstrap(environments["identity"])))

        url = f"http://{LOOPBACK}:{ports['gateway']}"
        self.environment = {
            "USAMETER_URL": url,
            _API_KEY: key.result(),
            "USAMETER_CRON_SECRET": secrets.cron_secret,
            "USAMETER_DATABASE_URL": database_url,
            "USAMETER_REDIS_URL": redis_url,
            **_addresses(ports),
        }
        write_dev_env(self.config.dev_env_path, self.environment)
        self.supervisor.mark_ready()
        self._report(StackReady(url, str(self.config.dev_env_path), time.monotonic() - began))

    def _choose_ports(self) -> dict[str, int]:
        """A free port for each child: the one it had the last time, if nobody has taken it since."""
        names = ["postgres", "valkey", *SERVICES, "gateway"]
        ports = {}
        if self.config.http_port:
            # Looked at first, so that the likeliest failure comes before seconds of work.
            check_port(self.config.http_port, "the REST API")
            ports["gateway"] = self.config.http_port
            names.remove("gateway")
        previous = self.supervisor.ports
        ports |= {name: previous[name] for name in names if name in previous and claim_port(previous[name])}
        missing = [name for name in names if name not in ports]
        return ports | dict(zip(missing, free_ports(len(missing)), strict=True))

    async def _start_servers(self, ports: dict[str, int]) -> tuple[str, str]:
        """Start the servers that were not given; the URLs of both, PostgreSQL's for its administrator."""
        database_url, redis_url = self.config.database_url, self.config.redis_url
        postgres = EmbeddedPostgres(self.config.home, ports["postgres"], durable=self.config.durable)
        valkey = EmbeddedValkey(self.config.home, ports["valkey"])
        servers = [server.spec() for server, url in ((postgres, database_url), (valkey, redis_url)) if url is None]
        await self.supervisor.start(*servers)
        if database_url is None:
            await postgres.ensure_database(DATABASE)
            database_url = postgres.url(DATABASE)
        return database_url, redis_url or valkey.url()

    async def _migrate(self, database_url: str, secrets: Secrets) -> None:
        environment = self._base_environment() | {"USAMETER_MIGRATE_DATABASE_URL": database_url}
        password = self._role_password(secrets)
        if password is not None:
            environment["USAMETER_ROLE_PASSWORD"] = password
        await run_to_end(
            ChildSpec(
                name="migrate",
                argv=_module("usameter_core.postgres", *SERVICES),
                env=environment,
                log_path=self.config.log_path("migrate"),
            ),
            timeout_seconds=_MIGRATE_TIMEOUT_SECONDS,
        )

    async def _bootstrap(self, environment: dict[str, str]) -> str:
        """The API key of the demo organization: the one in `dev.env` if it is still good, else a new one."""
        previous = read_dev_env(self.config.dev_env_path).get(_API_KEY)
        if previous:
            # Refused after the database was replaced; then a new key is what is wanted.
            with suppress(StartFailed):
                return await self._bootstrap_once(environment | {_API_KEY: previous}, "--api-key-env", _API_KEY)
        return await self._bootstrap_once(environment)

    async def _bootstrap_once(self, environment: dict[str, str], *options: str) -> str:
        log_path = self.config.log_path("bootstrap")
        output = await run_to_end(
            ChildSpec(
                name="bootstrap",
                argv=_module("usameter_identity", "bootstrap", "--organization", ORGANIZATION, *options),
                env=environment,
                log_path=log_path,
            ),
            timeout_seconds=_BOOTSTRAP_TIMEOUT_SECONDS,
        )
        try:
            return msgspec.json.decode(output, type=_Bootstrapped).api_key
        except msgspec.DecodeError as error:
            # The output is not repeated: it may hold a key.
            raise StartFailed("bootstrap", "did not print one JSON object with its key", log_path=log_path) from error

    def _service_environment(
        self, service: str, ports: dict[str, int], database_url: str, redis_url: str, secrets: Secrets
    ) -> dict[str, str]:
        environment = self._base_environment() | {
            "USAMETER_LISTEN": f"{LOOPBACK}:{ports[service]}",
            "USAMETER_DATABASE_URL": with_role(database_url, _role(service), self._role_password(secrets)),
            "USAMETER_REDIS_URL": redis_url,
            "USAMETER_INTERNAL_TOKEN": secrets.internal_token,
            **_addresses(ports),
        }
        if service == "ingest":
            environment["USAMETER_CRON_SECRET"] = secrets.cron_secret
        if service == "quota":
            # On a developer's machine the receivers are there too.
            environment.setdefault("USAMETER_WEBHOOK_ALLOW_PRIVATE", "true")
        return environment

    def _base_environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        return (
            inherited
            | dict(self.config.service_environment)
            | {
                "USAMETER_LOG_FORMAT": "json",
                "USAMETER_METRICS_PORT": "0",
            }
        )

    def _role_password(self, secrets: Secrets) -> str | None:
        return None if self.config.database_url is None else secrets.role_password

    def _gateway_spec(self, ports: dict[str, int]) -> ChildSpec:
        port = ports["gateway"]
        return ChildSpec(
            name="gateway",
            argv=_module("usameter_gateway", "serve"),
            env=self._base_environment() | _addresses(ports) | {"USAMETER_LISTEN": f"{LOOPBACK}:{port}"},
            log_path=self.config.log_path("gateway"),
            ready=http_probe(port),
            port=port,
        )

    async def _step(self, name: str, work: Awaitable[_T]) -> _T:
        began = time.monotonic()
        self._report(StepStarted(name))
        result = await work
        self._report(StepFinished(name, time.monotonic() - began))
        return result


def _service_spec(config: StackConfig, service: str, port: int, environment: dict[str, str]) -> ChildSpec:
    return ChildSpec(
        name=service,
        argv=_module(f"usameter_{service}", "serve"),
        env=environment,
        log_path=config.log_path(service),
        ready=grpc_probe(port),
        port=port,
    )


def _module(name: str, *arguments: str) -> list[str]:
    # -P: a file of the working directory must not take the place of a module.
    return [sys.executable, "-P", "-m", name, *arguments]


def _role(service: str) -> str:
    return f"usameter_{service}"


def _addresses(ports: dict[str, int]) -> dict[str, str]:
    return {f"USAMETER_{service.upper()}_ADDR": f"{LOOPBACK}:{ports[service]}" for service in SERVICES}


@asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first failure is raised as itself."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
