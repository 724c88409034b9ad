"""A HARD limit holds: never an event above it, counter and entries equal once the janitor has run, and full in the end.

Where processes are killed it is the whole platform, as `make run` starts it; else the services in this process.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import asyncpg
import psutil
import pytest

from tests.bench.load import expect_ok, http_request, open_connections
from tests.conftest import Database
from tests.support.audit import Entry, assert_books_agree, is_settled
from tests.support.clock import ManualClock
from tests.support.races import EVENT_TYPE, Books, Race, Send, never_above, read_books
from tests.support.services import INTERNAL_TOKEN, Services, open_quota_replica, open_replica, open_services
from tests.support.sql import fetch_value
from tests.support.stack import RunningStack
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2_grpc
from usameter.quota.v1 import quota_pb2, quota_pb2_grpc
from usameter_core.grpc.channels import open_channel
from usameter_core.postgres.pool import open_pool
from usameter_devstack.ports import free_port
from usameter_devstack.state import read_state
from usameter_ingest.clients import QuotaClient
from usameter_ingest.store.outcomes import OutcomeStore
from usameter_ingest.worker import Janitor

LIMIT = 1_000


@dataclass(frozen=True, slots=True)
class Platform:
    """A running stack, and all that it has accepted."""

    stack: RunningStack
    accepted: dict[str, Entry] = field(default_factory=dict)

    @property
    def database_url(self) -> str:
        """As superuser."""
        return self.stack.environment["USAMETER_DATABASE_URL"]

    def process(self, name: str) -> psutil.Process | None:
        """One of the stack's, as it runs now; None while it does not."""
        children = read_state(self.stack.home).children
        with suppress(StopIteration, psutil.NoSuchProcess):
            return psutil.Process(next(child.process.pid for child in children if child.name == name))
        return None

    @asynccontextmanager
    async def clients(self, race: Race, count: int) -> AsyncIterator[list[Send]]:
        """Clients with a connection each, and the limit that they race under."""
        api_key = self.stack.environment["USAMETER_API_KEY"]
        limit = json.dumps({"limit_value": str(LIMIT), "enforcement_mode": "HARD", "period": "MONTHLY"}).encode()
        async with open_connections(self.stack.url, count) as connections:
            path = f"/api/v1/quotas/{race.tenant_id}/{EVENT_TYPE}"
            expect_ok(await connections[0].exchange(http_request("PUT", path, api_key, limit)))
            yield [race.rest_client(connection, api_key) for connection in connections]

    async def is_settled(self) -> bool:
        return await is_settled(self.database_url)

    async def check(self, race: Race, *, accepted: int) -> None:
        """Exactly so many are accepted, and all books say so, of this race and of those before."""
        assert len(race.accepted) == accepted
        assert await read_books(self.database_url, race.tenant_id) == Books(counted=accepted, stored=accepted)
        self.accepted.update(race.accepted)
        await assert_books_agree(self.database_url, self.accepted)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    stack = RunningStack.start(tmp_path_factory.mktemp("hard_limit") / "home", http_port=free_port())
    yield Platform(stack)
    stack.stop()


@pytest.mark.parametrize(("clients", "requests", "events"), [(64, 5_000, 1), (32, 1_000, 7)])
async def test_exactly_as_many_are_accepted_as_fit(
    platform: Platform, clients: int, requests: int, events: int
) -> None:
    """I4: nothing goes wrong here, so no janitor and no second try is needed."""
    race = Race()
    async with platform.clients(race, clients) as senders:
        async with never_above(LIMIT, platform.database_url, race.tenant_id):
            await race.run(senders, race.requests(requests, events=events))
        await until(platform.is_settled, "what was reserved is settled")
        fitting = LIMIT // events
        assert len(race.refused) == requests - fitting
        await platform.check(race, accepted=fitting * events)


Fault = Callable[[Platform, Race], Awaitable[None]]


def killed(name: str) -> Fault:
    """`kill -9`, at whatever it is doing."""

    async def strike(platform: Platform, race: Race) -> None:
        await kill(platform, name)

    return strike


async def quota_killed_in_reserve(platform: Platform, race: Race) -> None:
    """What it was about to reserve is reserved after its end, and nobody hears of it."""
    lock = "SELECT quota.lock_heads('{org_id}', '{{{tenant_id}}}', '{{scarce}}')"
    async with blocked(platform, race, "quota", "quota.reserve(", by=lock):
        await kill(platform, "quota")


def ingest_killed_with_its_insert_blocked(by: str) -> Fault:
    """`kill -9` between reserve and insert; PostgreSQL notices only once the insert goes on."""

    async def strike(platform: Platform, race: Race) -> None:
        async with blocked(platform, race, "ingest", "ingest.record_events(", by=by):
            left_open = await kill(platform, "ingest")
            assert left_open
            await until(
                partial(janitor_has_come, platform, left_open),
                "the janitor has given the reservations away, or waits for the insert",
            )

    return strike


@asynccontextmanager
async def blocked(platform: Platform, race: Race, service: str, text: str, *, by: str) -> AsyncIterator[None]:
    """A statement of a service that holds this text waits, until the end and even if its service is gone.

    Args:
        by: The statement that takes the lock.
    """
    admin = await asyncpg.connect(platform.database_url)
    try:
        async with admin.transaction():
            org_id = await admin.fetchval("SELECT org_id FROM quota.quota_limit WHERE tenant_id = $1", race.tenant_id)
            await admin.execute(by.format(org_id=org_id, tenant_id=race.tenant_id))
            await until(partial(is_waiting, platform, service, text), f"{text} waits")
            yield
            assert await is_waiting(platform, service, text), "the statement of the dead is still to come"
    finally:
        await admin.close()


async def kill(platform: Platform, name: str) -> list[Any]:
    """`kill -9`; once it has been started again, the ids of what was reserved then, to the janitor a minute ago."""
    process = platform.process(name)
    assert process is not None
    process.kill()
    left_open = await age_open_reservations(platform)
    await until(partial(runs_again, platform, name, process), f"{name} is started again", seconds=60)
    return left_open


@pytest.mark.parametrize(
    "strike",
    [
        pytest.param(killed("valkey"), id="valkey"),
        pytest.param(killed("quota"), id="quota"),
        pytest.param(quota_killed_in_reserve, id="quota-in-reserve"),
        pytest.param(killed("ingest"), id="ingest"),
        # Before the outcome row is written: the janitor gives the reservation away, and the insert has to roll back.
        pytest.param(
            ingest_killed_with_its_insert_blocked("SELECT pg_advisory_xact_lock(ingest.ledger_lock_key('{org_id}'))"),
            id="ingest-before-insert",
        ),
        # After it: the janitor waits for what the insert comes to.
        pytest.param(
            ingest_killed_with_its_insert_blocked("LOCK TABLE ingest.usage_event IN SHARE MODE"),
            id="ingest-in-insert",
        ),
    ],
)
async def test_whatever_is_killed_midway_the_limit_is_never_exceeded_and_exactly_full_in_the_end(
    platform: Platform, strike: Fault
) -> None:
    """I4: at no moment more than the limit, equal after the janitor, and full once the refused are sent again."""
    race, url = Race(), platform.database_url
    # 5,000 events. Batches leave gaps, which single events fill.
    singles, batches = race.requests(2_900), race.requests(300, events=7)
    requests = [
        request for number, batch in enumerate(batches) for request in (*singles[number :: len(batches)], batch)
    ]

    async def is_midway() -> bool:
        return len(race.accepted) >= LIMIT // 3

    async with platform.clients(race, 64) as senders, never_above(LIMIT, url, race.tenant_id):
        running = asyncio.create_task(race.run(senders, requests))
        try:
            await until(is_midway, "a third of the limit is taken")
            await strike(platform, race)
            await running
        finally:
            running.cancel()
        await settle_everything(platform)
        books = await read_books(url, race.tenant_id)
        assert books.counted == books.stored == len(race.accepted)
        await race.send_refused_again(senders)
        await settle_everything(platform)
        await platform.check(race, accepted=LIMIT)
        assert race.refused


async def settle_everything(platform: Platform) -> None:
    """As the janitor does once some time has passed."""
    await age_open_reservations(platform)
    await until(platform.is_settled, "nothing is reserved any more")


async def age_open_reservations(platform: Platform) -> list[Any]:
    """Let a minute pass for what is reserved now, so that the janitor sees to it; the ids."""
    connection = await asyncpg.connect(platform.database_url)
    try:
        rows = await connection.fetch(
            """UPDATE quota.reservation SET created_at = created_at - interval '1 minute'
               WHERE state = 'OPEN' RETURNING reservation_id"""
        )
        return [row["reservation_id"] for row in rows]
    finally:
        await connection.close()


async def janitor_has_come(platform: Platform, reservation_ids: list[Any]) -> bool:
    connection = await asyncpg.connect(platform.database_url)
    try:
        still_open = await connection.fetchval(
            "SELECT count(*) FROM quota.reservation WHERE state = 'OPEN' AND reservation_id = ANY ($1)", reservation_ids
        )
    finally:
        await connection.close()
    return still_open == 0 or await is_waiting(platform, "ingest", "'ABORTED'")


async def is_waiting(platform: Platform, service: str, text: str) -> bool:
    """Whether a statement of a service that holds this text waits for a lock."""
    connection = await asyncpg.connect(platform.database_url)
    try:
        return bool(await connection.fetchval(WAITING, f"usameter_{service}", text))
    finally:
        await connection.close()


async def runs_again(platform: Platform, name: str, killed: psutil.Process) -> bool:
    process = platform.process(name)
    return process is not None and process.pid != killed.pid


WAITING = """SELECT count(*)::int FROM pg_stat_activity WHERE datname = current_database() AND usename = $1
             AND state = 'active' AND wait_event_type = 'Lock' AND strpos(query, $2) > 0"""


async def set_limit(services: Services, race: Race, limit: int, *, quotas: Any = None) -> None:
    request = quota_pb2.SetQuotaRequest(
        tenant_id=race.tenant_id,
        event_type=EVENT_TYPE,
        limit_value=str(limit),
        enforcement_mode=quota_pb2.HARD,
        period=quota_pb2.MONTHLY,
    )
    await (quotas or services.quotas).SetQuota(request, metadata=services.metadata, timeout=30)


async def run_janitor(database: Database, services: Services) -> int:
    """The janitor, impatient."""
    async with open_pool(database.role_url("ingest"), application_name="test") as pool:
        quota = QuotaClient(services.quota, internal_token=INTERNAL_TOKEN)
        return await Janitor(quota=quota, outcomes=OutcomeStore(pool), min_age_seconds=0).run_once()


async def check(database: Database, race: Race, *, accepted: int) -> None:
    """Exactly so many are accepted, and all books say so."""
    await until(partial(is_settled, database.admin_url), "what was reserved is settled")
    assert len(race.accepted) == accepted
    assert await read_books(database.admin_url, race.tenant_id) == Books(counted=accepted, stored=accepted)
    await assert_books_agree(database.admin_url, race.accepted)


@pytest.mark.parametrize(("others", "accepted"), [(40, 100), (41, 41), (100, 100)])
async def test_an_insert_that_hangs_until_others_have_its_quota_does_not_come_back_above_the_limit(
    database: Database, others: int, accepted: int
) -> None:
    """I4: 60 of 100 are reserved, and given away while their insert hangs. It is recorded if there is room again."""
    race, clock = Race(), ManualClock()
    (slow,), (fast,) = race.requests(1, events=60), race.requests(1, events=others)
    async with (
        open_services(database, clock=clock) as services,
        open_replica(database, services, clock=clock) as replica,
    ):
        await set_limit(services, race, 100)
        # Each by an ingest of its own: one has only one small group under way.
        clients = [
            race.grpc_client(stub, services.metadata)
            for stub in (services.events, event_pb2_grpc.EventServiceStub(replica))
        ]
        admin = await asyncpg.connect(database.admin_url)
        try:
            async with never_above(100, database.admin_url, race.tenant_id):
                async with admin.transaction():
                    await admin.execute("SELECT pg_advisory_xact_lock(ingest.ledger_lock_key($1))", services.org_id)
                    hanging = asyncio.create_task(race.run(clients[:1], [slow]))
                    await until(partial(are_waiting, database, "ingest", 1), "the insert hangs")
                    assert await run_janitor(database, services) == 1
                    assert await read_books(database.admin_url, race.tenant_id) == Books(counted=0, stored=0)
                    filling = asyncio.create_task(race.run(clients[1:], [fast]))
                    await until(partial(are_waiting, database, "ingest", 2), "others have reserved what was given away")
                    assert await read_books(database.admin_url, race.tenant_id) == Books(counted=others, stored=0)
                await asyncio.gather(hanging, filling)
        finally:
            await admin.close()
        await check(database, race, accepted=accepted)
        assert set(fast) <= race.accepted.keys()
        await race.send_refused_again(clients)
        await check(database, race, accepted=accepted)


@pytest.mark.parametrize("same_keys", [False, True])
async def test_two_replicas_of_quota_and_of_ingest_fill_a_limit_exactly(database: Database, same_keys: bool) -> None:
    """I4: also where each event is sent through both at once, as by a client that has lost patience."""
    race, clock = Race(), ManualClock()
    async with (
        open_services(database, clock=clock) as services,
        open_quota_replica(database, services, clock=clock) as quota,
        open_replica(database, replace(services, quota_address=quota), clock=clock) as replica,
    ):
        await set_limit(services, race, 200)
        mine = [race.grpc_client(services.events, services.metadata)] * 16
        theirs = [race.grpc_client(event_pb2_grpc.EventServiceStub(replica), services.metadata)] * 16
        requests = race.requests(500)
        async with never_above(200, database.admin_url, race.tenant_id):
            await asyncio.gather(
                race.run(mine, requests if same_keys else requests[0::2]),
                race.run(theirs, requests if same_keys else requests[1::2]),
            )
            if same_keys:
                # Refused while the other of a pair held quota for the same event.
                await until(partial(is_settled, database.admin_url), "what was reserved is settled")
                await race.send_refused_again([*mine, *theirs])
        await check(database, race, accepted=200)


@pytest.mark.parametrize("lowered_first", [False, True])
async def test_a_limit_that_is_lowered_while_reserves_wait_holds_from_its_answer_on(
    database: Database, lowered_first: bool
) -> None:
    """I4: whoever was counted before the change stays, and what comes after it goes by the new limit."""
    race, clock = Race(), ManualClock()
    async with (
        open_services(database, clock=clock) as services,
        open_quota_replica(database, services, clock=clock) as quota,
        open_replica(database, replace(services, quota_address=quota), clock=clock) as replica,
        open_channel(quota) as quota_channel,
    ):
        await set_limit(services, race, 100)
        clients = [
            race.grpc_client(stub, services.metadata)
            for stub in (services.events, event_pb2_grpc.EventServiceStub(replica))
        ]
        before, *singles = race.requests(120)
        batches = race.requests(2, events=30)
        await race.run(clients[:1], [before])
        await until(partial(is_settled, database.admin_url), "what was reserved is settled")
        lower = partial(set_limit, services, race, 50, quotas=quota_pb2_grpc.QuotaServiceStub(quota_channel))
        reserve = partial(race.run, clients, batches)
        admin = await asyncpg.connect(database.admin_url)
        try:
            async with admin.transaction():
                await admin.execute(
                    "SELECT quota.lock_heads($1, $2, $3)", services.org_id, [race.tenant_id], [EVENT_TYPE]
                )
                first = asyncio.create_task(lower() if lowered_first else reserve())
                await until(partial(are_waiting, database, "quota", 1 if lowered_first else 2), "the first wait")
                second = asyncio.create_task(reserve() if lowered_first else lower())
                await until(partial(are_waiting, database, "quota", 3), "all wait")
            await asyncio.gather(first, second)
        finally:
            await admin.close()
        counted = await fetch_value(
            database, "SELECT current::int FROM quota.limit_change WHERE tenant_id = $1 AND version = 2", race.tenant_id
        )
        assert counted == (1 if lowered_first else 61)
        assert len(race.accepted) == (31 if lowered_first else 61)
        await race.run(clients * 8, singles)
        await race.send_refused_again(clients * 8)
        await check(database, race, accepted=max(50, counted))


async def are_waiting(database: Database, service: str, count: int) -> bool:
    """Whether so many statements of a service wait for a lock."""
    waiting = await fetch_value(database, WAITING, f"usameter_{service}", "")
    return bool(waiting == count)
