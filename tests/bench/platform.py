"""The platform under measurement: started like `make run`, durable, and watched from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from uuid import UUID

import asyncpg
import httpx
import psutil

from tests.support.stack import RunningStack
from usameter_core.ids import OrgId
from usameter_core.postgres.pool import open_pool
from usameter_devstack.credentials import with_role
from usameter_devstack.ports import free_port
from usameter_devstack.state import read_state
from usameter_identity.bootstrap import bootstrap
from usameter_identity.service import IdentityService
from usameter_identity.store import IdentityStore

_CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Customer:
    """An organization of its own, so that rows do not meet in one ledger, and a key of all scopes."""

    org_id: OrgId
    api_key: str


class Platform:
    """A running stack."""

    def __init__(self, stack: RunningStack) -> None:
        self._stack = stack
        self._numbers = count(1)

    @property
    def url(self) -> str:
        """Of the gateway."""
        return self._stack.url

    @property
    def directory(self) -> Path:
        """For logs and the like; the home lies in it."""
        return self._stack.home.parent

    @property
    def environment(self) -> Mapping[str, str]:
        """What dev.env says."""
        return self._stack.environment

    @property
    def database_url(self) -> str:
        """As superuser."""
        return self.environment["USAMETER_DATABASE_URL"]

    async def new_customer(self) -> Customer:
        """A new organization."""
        url = with_role(self.database_url, "usameter_identity", None)
        async with open_pool(url, application_name="bench") as pool:
            service = IdentityService(store=IdentityStore(pool))
            made = await bootstrap(service, organization=f"bench {next(self._numbers)}", api_key="")
        return Customer(OrgId(UUID(made.org_id)), made.api_key)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """A connection as superuser, with no time limit on statements."""
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    async def checkpoint(self) -> None:
        """Write out what the row before has changed: that is not the next one's to pay."""
        async with self.connect() as connection:
            await connection.execute("CHECKPOINT")

    async def seal_everything(self) -> None:
        """Seal every open epoch, however long that takes."""
        headers = {"Authorization": f"Bearer {self.environment['USAMETER_CRON_SECRET']}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60) as client:
            while (answer := await client.post("/api/cron/snapshots")).status_code != httpx.codes.OK:
                assert answer.status_code == httpx.codes.ACCEPTED, answer.text

    def process(self, name: str) -> psutil.Process:
        """One of the stack's processes, e.g. "ingest"."""
        children = read_state(self._stack.home).children
        return psutil.Process(next(child.process.pid for child in children if child.name == name))

    def cpu_seconds(self) -> dict[str, float]:
        """CPU that each process has used so far, the client's own included.

        PostgreSQL is the sum of its processes that are alive now.
        """
        used = {_CLIENT: _cpu_seconds(psutil.Process())}
        for child in read_state(self._stack.home).children:
            process = psutil.Process(child.process.pid)
            family = [process, *process.children(recursive=True)]
            used[child.name] = sum(_cpu_seconds(each) for each in family)
        return used


class CpuMeter:
    """Adds up who used CPU during the runs of a row."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._seconds: dict[str, float] = {}
        self._events = 0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count what is used meanwhile."""
        before = self._platform.cpu_seconds()
        yield
        for name, seconds in self._platform.cpu_seconds().items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds - before[name]

    def add_events(self, events: int) -> None:
        """Say how many events that was for."""
        self._events += events

    def microseconds_an_event(self) -> dict[str, float]:
        """By process, those that used next to nothing left out."""
        used = {name: seconds * 1e6 / self._events for name, seconds in self._seconds.items()}
        return {name: microseconds for name, microseconds in used.items() if microseconds >= 0.05}


@asynccontextmanager
async def open_platform(directory: Path) -> AsyncIterator[Platform]:
    """A stack on a fresh home under `directory`, stopped at the end."""
    stack = RunningStack.start(directory / "platform", http_port=free_port())
    try:
        yield Platform(stack)
    finally:
        stack.stop()


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
