"""kill -9 of one process after the other under load; clients send again on the same keys until they have an answer.

One kill of each process by default; USAMETER_FAULT_KILLS=100 makes it a long run. The seed is
printed, and USAMETER_FAULT_SEED repeats it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.audit import Entry, assert_books_agree, is_settled
from tests.support.stack import RunningStack
from tests.support.wait import until
from usameter_devstack.ports import free_port

VICTIMS = ("gateway", "identity", "ingest", "quota", "valkey", "postgres")
KILLS = int(os.environ.get("USAMETER_FAULT_KILLS", str(len(VICTIMS))))
SEED = int(os.environ.get("USAMETER_FAULT_SEED", str(random.randrange(10**6))))
# The supervisor gives up on a child that dies more often than five times a minute.
SECONDS_BETWEEN_KILLS_OF_ONE = 15
# After each kill the limit is raised by this, so that the racers meet it again and again.
LIMIT_STEP = 200
LIMITED = {"tenant_id": "limited", "event_type": "scarce"}


class Client:
    """Sends batches, each on the same keys until the answer says what became of it."""

    def __init__(self, number: int, http: httpx.AsyncClient, source: random.Random) -> None:
        self.acknowledged: dict[str, Entry] = {}
        self._number = number
        self._http = http
        self._source = source
        self._sent = 0
        self._refused: list[dict[str, Any]] = []

    async def record(self, stop: asyncio.Event) -> None:
        """Batches of tenants without a limit."""
        while not stop.is_set():
            batch = [
                {
                    "event_type": "req",
                    "tenant_id": f"tenant{self._source.randrange(20)}",
                    "idempotency_key": key,
                    "quantity_decimal": f"{self._source.randrange(1, 10**6)}.{self._source.randrange(10**6):06}",
                }
                for key in self._keys(self._source.choice([1, 5, 40]))
            ]
            assert await self._send(batch), "no limit was set"

    async def race(self, stop: asyncio.Event, timestamp: str) -> None:
        """Batches of the limited tenant; one that is refused is sent again until there is room.

        Some have their quota reserved first, of which their first event takes what it needs; some of these never come.
        """
        while not stop.is_set():
            batch = self._refused or self._limited(self._source.randrange(1, 8), timestamp)
            if self._source.random() < 0.5:
                await self._reserve(batch)
                if self._source.random() < 0.1:
                    continue
            self._refused = [] if await self._send(batch) else batch
            if self._refused:
                await asyncio.sleep(0.02)

    async def fill(self, timestamp: str) -> None:
        """What was refused last, if there is room, and then single events until there is none."""
        if self._refused:
            await self._send(self._refused)
        while await self._send(self._limited(1, timestamp)):
            pass

    async def _reserve(self, batch: list[dict[str, Any]]) -> None:
        """Where there is no room, or it was reserved and closed before, the event names a reservation all the same."""
        name = f"of-{batch[0]['idempotency_key']}"
        body = {**LIMITED, "quantity": str(len(batch)), "reservation_id": name, "ttl_seconds": 5}
        await persist(self._http, "POST", "/api/v1/quotas:reserve", body, expected=(200, 403, 409))
        batch[0]["reservation_id"] = name

    def _limited(self, count: int, timestamp: str) -> list[dict[str, Any]]:
        return [
            {**LIMITED, "idempotency_key": key, "quantity_decimal": "1", "timestamp": timestamp}
            for key in self._keys(count)
        ]

    def _keys(self, count: int) -> list[str]:
        self._sent += 1
        return [f"{self._number}.{self._sent}.{i}" for i in range(count)]

    async def _send(self, batch: list[dict[str, Any]]) -> bool:
        """Whether the batch was recorded; else it was over quota."""
        answer = await persist(self._http, "POST", "/api/v1/events", {"events": batch}, expected=(200, 403))
        if answer.status_code == 403:
            assert answer.json()["code"] == "QUOTA_EXCEEDED", answer.text
            return False
        for event, result in zip(batch, answer.json()["results"], strict=True):
            self.acknowledged[event["idempotency_key"]] = Entry(
                result["event_id"], event["tenant_id"], Decimal(event["quantity_decimal"])
            )
        return True


async def persist(
    http: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None, *, expected: tuple[int, ...] = (200,)
) -> httpx.Response:
    """Send a request that may be sent again until somebody answers it."""
    while True:
        try:
            answer = await http.request(method, path, json=body)
        except httpx.TransportError:
            await asyncio.sleep(0.05)
            continue
        if answer.status_code in expected:
            return answer
        assert answer.status_code == 503, answer.text
        assert "retry-after" in answer.headers
        await asyncio.sleep(0.05)


async def seal_again_and_again(http: httpx.AsyncClient, secret: str, stop: asyncio.Event) -> None:
    http.headers["Authorization"] = f"Bearer {secret}"
    while not stop.is_set():
        await persist(http, "POST", "/api/cron/snapshots", None, expected=(200, 202))
        await asyncio.sleep(0.5)


async def raise_limit(http: httpx.AsyncClient, limit: int) -> None:
    """Set the next limit; what is used has not gone above the one before (I4)."""
    path = f"/api/v1/quotas/{LIMITED['tenant_id']}/{LIMITED['event_type']}"
    if limit > LIMIT_STEP:
        before = (await persist(http, "GET", path, None)).json()
        assert Decimal(before["current"]) <= limit - LIMIT_STEP == Decimal(before["limit_value"])
    body = {"limit_value": str(limit), "enforcement_mode": "HARD", "period": "MONTHLY"}
    await persist(http, "PUT", path, body)


def children(stack: RunningStack) -> dict[str, int]:
    # Not `status`, which is 1 while somebody is being started again.
    process = stack.command("status", "--json")
    output, _ = process.communicate(timeout=60)
    return {child["name"]: child["pid"] for child in json.loads(output)["children"] if child["alive"]}


def victims(source: random.Random) -> Iterator[str]:
    """Each once a round, in an order of its own."""
    while True:
        yield from source.sample(VICTIMS, k=len(VICTIMS))


async def kill_some(stack: RunningStack, http: httpx.AsyncClient, source: random.Random) -> None:
    """Kill, wait until the stack has noticed and has started it again, and kill the next."""
    last: dict[str, float] = {}
    for number, name in zip(range(1, KILLS + 1), victims(source), strict=False):
        rested = last.get(name, 0.0) + SECONDS_BETWEEN_KILLS_OF_ONE - time.monotonic()
        await asyncio.sleep(max(source.uniform(0.2, 1.0), rested))
        pid = (await asyncio.to_thread(children, stack))[name]
        psutil.Process(pid).kill()
        last[name] = time.monotonic()

        async def restarted(name: str = name, pid: int = pid) -> bool:
            return (await asyncio.to_thread(children, stack)).get(name) not in {None, pid}

        await until(restarted, f"{name} is started again", seconds=60)
        await raise_limit(http, (number + 1) * LIMIT_STEP)


@pytest.mark.timeout(120 + 30 * KILLS)
async def test_killed_at_random_under_load_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    """I1, I2, I3, I4: every acknowledged event once, as it was sent, and none besides; all sums and counters agree."""
    print(f"USAMETER_FAULT_SEED={SEED}")  # noqa: T201 - so that a failure can be repeated
    source = random.Random(SEED)
    # All in one period of the limit, also where the month ends meanwhile.
    timestamp = datetime.now(UTC).isoformat()
    stack = await asyncio.to_thread(RunningStack.start, tmp_path / "home", http_port=free_port())
    headers = {"Authorization": f"Bearer {stack.environment['USAMETER_API_KEY']}"}
    try:
        async with (
            httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=10) as http,
            httpx.AsyncClient(base_url=stack.url, timeout=10) as scheduler,
        ):
            recorders = [Client(number, http, random.Random(SEED + number)) for number in range(6)]
            racers = [Client(number, http, random.Random(SEED + number)) for number in range(6, 10)]
            stop = asyncio.Event()
            await raise_limit(http, LIMIT_STEP)
            async with asyncio.TaskGroup() as tasks:
                for client in recorders:
                    tasks.create_task(client.record(stop))
                for client in racers:
                    tasks.create_task(client.race(stop, timestamp))
                secret = stack.environment["USAMETER_CRON_SECRET"]
                tasks.create_task(seal_again_and_again(scheduler, secret, stop))
                await kill_some(stack, http, source)
                stop.set()
            await until(lambda: settled(stack), "the janitor has settled what the kills left open", seconds=90)
            for client in racers:
                await client.fill(timestamp)
        await until(lambda: settled(stack), "what came last is settled")

        acknowledged = {key: entry for client in recorders + racers for key, entry in client.acknowledged.items()}
        assert len(acknowledged) > 100
        limited = sum(entry.quantity for entry in acknowledged.values() if entry.tenant_id == LIMITED["tenant_id"])
        assert limited == (KILLS + 1) * LIMIT_STEP
        stack.seal()
        await assert_books_agree(stack.environment["USAMETER_DATABASE_URL"], acknowledged)
    finally:
        await asyncio.to_thread(stack.stop)


async def settled(stack: RunningStack) -> bool:
    return await is_settled(stack.environment["USAMETER_DATABASE_URL"])
