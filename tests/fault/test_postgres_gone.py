"""PostgreSQL stops, or stalls, under load: clear refusals, nothing lost, and no service has to be restarted."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.audit import Entry, assert_books_agree, is_settled
from tests.support.stack import RunningStack
from tests.support.wait import until
from usameter_devstack.ports import free_port
from usameter_devstack.postgres import EmbeddedPostgres

CLIENTS = 32
RECOVERY_SECONDS_MAX = 20


@dataclass(slots=True)
class Load:
    """Clients that send single events, each until it is acknowledged."""

    http: httpx.AsyncClient
    acknowledged: dict[str, Entry] = field(default_factory=dict)
    # How long each request took that was answered with 503.
    refused_after_seconds: list[float] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run_client(self, number: int) -> None:
        for sent in itertools.count():
            if self.stop.is_set():
                return
            key, tenant = f"{number}.{sent}", f"tenant{sent % 5}"
            body = {"event_type": "req", "tenant_id": tenant, "idempotency_key": key}
            event_id = await self._send(body)
            self.acknowledged[key] = Entry(event_id, tenant, Decimal(1))

    async def _send(self, body: dict[str, str]) -> str:
        while True:
            began = time.monotonic()
            answer = await self.http.post("/api/v1/events", json=body)
            if answer.status_code == 200:
                event_id: str = answer.json()["event_id"]
                return event_id
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["code"] == "UNAVAILABLE" and answer.json()["details"] == {"retry_safe": True}
            self.refused_after_seconds.append(time.monotonic() - began)
            await asyncio.sleep(0.05)

    async def recovers(self) -> float:
        """The seconds until every client has been acknowledged anew."""
        began = time.monotonic()
        before = set(self.acknowledged)

        async def all_go_on() -> bool:
            return len({key.split(".")[0] for key in self.acknowledged.keys() - before}) == CLIENTS

        await until(all_go_on, "every client goes on", seconds=RECOVERY_SECONDS_MAX)
        return time.monotonic() - began

    async def is_refused(self, times: int) -> None:
        """Return after so many further refusals."""
        at_least = len(self.refused_after_seconds) + times

        async def enough() -> bool:
            return len(self.refused_after_seconds) >= at_least

        await until(enough, "clients are refused", seconds=40)


@asynccontextmanager
async def under_load(stack: RunningStack) -> AsyncIterator[Load]:
    headers = {"Authorization": f"Bearer {stack.environment['USAMETER_API_KEY']}"}
    async with httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=100) as http:
        load = Load(http)
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(load.run_client(number))
            await load.recovers()
            yield load
            load.stop.set()


@contextmanager
def stalled(server: EmbeddedPostgres) -> Iterator[None]:
    """Every process of the server stands still; its connections stay open."""
    assert server.pid is not None
    postmaster = psutil.Process(server.pid)
    postmaster.suspend()
    backends = postmaster.children()
    try:
        for backend in backends:
            backend.suspend()
        yield
    finally:
        for process in (*backends, postmaster):
            process.resume()


@pytest.mark.timeout(300)
async def test_postgres_stops_and_stalls_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I1, I2, I4: who is refused may try again; who is acknowledged is stored, once."""
    server = EmbeddedPostgres(tmp_path / "server", free_port())
    monkeypatch.setenv("DATABASE_URL", server.url("usameter"))
    async with AsyncExitStack() as running:
        await running.enter_async_context(server)
        await server.ensure_database("usameter")
        stack = await asyncio.to_thread(RunningStack.start, tmp_path / "home", http_port=free_port())
        try:
            processes = {process.pid for process in stack.tree()}
            async with under_load(stack) as load:
                await running.aclose()
                await load.is_refused(200)
                assert max(load.refused_after_seconds) < 15
                await running.enter_async_context(server)
                await load.recovers()
                with stalled(server):
                    await load.is_refused(CLIENTS)
                await load.recovers()
            assert max(load.refused_after_seconds) < 35, "the edge answers within 30 seconds"
            assert {process.pid for process in stack.tree()} == processes
            url = stack.environment["USAMETER_DATABASE_URL"]
            await until(lambda: is_settled(url), "everything is settled", seconds=60)
            await assert_books_agree(url, load.acknowledged)
        finally:
            await asyncio.to_thread(stack.stop)
