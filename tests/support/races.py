"""Clients that race for the room under a hard limit, each until its requests are accepted or refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from typing import Any

import asyncpg
import grpc.aio

from tests.bench.load import HttpConnection, UnexpectedAnswer, http_request
from tests.support.audit import Entry
from tests.support.services import reason_of
from usameter.ingest.v1 import event_pb2

EVENT_TYPE = "scarce"
# The keys of events of quantity 1 that are sent together.
Request = tuple[str, ...]
# Sends a request again and again, on the same keys, until it is answered: with the ids of the events, or
# None where it is over quota.
Send = Callable[[Request], Awaitable[list[str] | None]]
_PAUSE_SECONDS = 0.05
_races = count(1)


@dataclass(slots=True)
class Race:
    """What was asked for under one tenant's limit, and what came of it. Both are complete once `run` returns."""

    tenant_id: str = field(default_factory=lambda: f"racer{next(_races)}")
    # Of all events, so that they meet in one period of the limit, also where the month ends meanwhile.
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))
    # By key.
    accepted: dict[str, Entry] = field(default_factory=dict)
    refused: list[Request] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)

    def requests(self, count: int, *, events: int = 1) -> list[Request]:
        """Requests of so many events each, on new keys."""
        return [tuple(f"{self.tenant_id}.{next(self._numbers)}" for _ in range(events)) for _ in range(count)]

    async def run(self, clients: Sequence[Send], requests: Iterable[Request]) -> None:
        """Send the requests, each client its next one as soon as it has its answer."""
        waiting = iter(requests)

        async def send_some(send: Send) -> None:
            for request in waiting:
                event_ids = await send(request)
                if event_ids is None:
                    self.refused.append(request)
                    continue
                for key, event_id in zip(request, event_ids, strict=True):
                    entry = Entry(event_id, self.tenant_id, Decimal(1))
                    # Where a key was sent twice, it is the same event.
                    assert self.accepted.setdefault(key, entry) == entry

        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(send_some(client))

    async def send_refused_again(self, clients: Sequence[Send]) -> None:
        """All that were refused, on the same keys, once more."""
        refused, self.refused = self.refused, []
        await self.run(clients, refused)

    def rest_client(self, connection: HttpConnection, api_key: str) -> Send:
        """Sends through the gateway: one event by itself, several as a batch."""

        async def send(request: Request) -> list[str] | None:
            events = [{**event, "timestamp": self.timestamp.isoformat()} for event in self._events(request)]
            single = len(events) == 1
            body = json.dumps(events[0] if single else {"events": events}).encode()
            while True:
                answer = await connection.exchange(http_request("POST", "/api/v1/events", api_key, body))
                said = json.loads(answer.body)
                match answer.status, said.get("code"):
                    case 200, _:
                        return [result["event_id"] for result in ([said] if single else said["results"])]
                    case 403, "QUOTA_EXCEEDED":
                        return None
                    case 503, _:
                        await asyncio.sleep(_PAUSE_SECONDS)
                    case _:
                        raise UnexpectedAnswer(f"{answer.status} {answer.body!r}")

        return send

    def grpc_client(self, stub: Any, metadata: Sequence[tuple[str, str]]) -> Send:
        """Sends to an ingest of one's choice."""

        async def send(request: Request) -> list[str] | None:
            message = event_pb2.RecordEventsRequest(
                events=[event_pb2.EventInput(**event, timestamp=self.timestamp) for event in self._events(request)]
            )
            while True:
                try:
                    answer = await stub.RecordEvents(message, metadata=metadata, timeout=30)
                    return [result.event_id for result in answer.results]
                except grpc.aio.AioRpcError as error:
                    reason = reason_of(error)
                    if reason == "QUOTA_EXCEEDED":
                        return None
                    assert reason == "UNAVAILABLE", error
                    await asyncio.sleep(_PAUSE_SECONDS)

        return send

    def _events(self, request: Request) -> list[dict[str, Any]]:
        return [{"tenant_id": self.tenant_id, "event_type": EVENT_TYPE, "idempotency_key": key} for key in request]


@dataclass(frozen=True, slots=True)
class Books:
    """How much of a limit is taken, by quota's counter and by what ingest has stored."""

    counted: int
    stored: int


async def read_books(url: str, tenant_id: str) -> Books:
    """The books of a tenant, in one snapshot; `url`: as superuser."""
    connection = await asyncpg.connect(url)
    try:
        return await _read_books(connection, tenant_id)
    finally:
        await connection.close()


@asynccontextmanager
async def never_above(limit: int, url: str, tenant_id: str) -> AsyncIterator[None]:
    """Look at the books all the time; as soon as they show more than the limit, what runs meanwhile fails (I4)."""
    connection = await asyncpg.connect(url)

    async def watch() -> None:
        while True:
            books = await _read_books(connection, tenant_id)
            assert books.stored <= books.counted <= limit, books
            await asyncio.sleep(0.02)

    try:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch())
            yield
            watching.cancel()
    finally:
        await connection.close()


async def _read_books(connection: asyncpg.Connection[asyncpg.Record], tenant_id: str) -> Books:
    row = await connection.fetchrow(
        """SELECT (SELECT coalesce(sum(quantity), 0)::int FROM quota.usage_day WHERE tenant_id = $1) AS counted,
                  (SELECT coalesce(sum(quantity), 0)::int FROM ingest.usage_event WHERE tenant_id = $1) AS stored""",
        tenant_id,
    )
    assert row is not None
    return Books(row["counted"], row["stored"])
