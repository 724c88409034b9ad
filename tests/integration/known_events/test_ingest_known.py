"""Known events: the cache answers as PostgreSQL does, or not at all."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.conftest import Database
from tests.support.known_events import NOW, Seconds, cached_ids, correct, event, record, stored
from tests.support.sql import execute, fetch_value
from tests.support.wait import until
from usameter_core.errors import Unavailable
from usameter_core.ids import OrgId, new_uuid
from usameter_core.postgres.migrate import migrate
from usameter_core.postgres.pool import Pool, open_pool
from usameter_core.redis.breaker import CircuitBreaker
from usameter_devstack.fault_proxy import FaultProxy
from usameter_devstack.ports import free_port
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_ingest.counters import known as known_module
from usameter_ingest.counters.known import KnownEventCache
from usameter_ingest.domain.event import CorrectionKind, UsageEvent
from usameter_ingest.metrics import KNOWN_EVENTS, KNOWN_EVENTS_DROPPED
from usameter_ingest.service.known import KnownEvents
from usameter_ingest.store.entries import GENERATION_SECONDS, EntryStore, EventAlreadyStored


async def test_the_cache_answers_what_postgresql_answers(
    entries: EntryStore, cache: KnownEventCache, org_id: OrgId
) -> None:
    events = [
        event(org_id, "given", timestamp=NOW + timedelta(microseconds=1)),
        event(org_id, "not given"),
        event(org_id, "the beginning of time", timestamp=datetime.min.replace(tzinfo=UTC)),
        event(org_id, "the end of time", timestamp=datetime(9999, 12, 31, 23, 59, 59, 999_998, tzinfo=UTC)),
        event(org_id, "voided"),
        event(org_id, "amended"),
    ]
    await record(entries, org_id, *events)
    await correct(entries, org_id, events[4].event_id, CorrectionKind.VOID)
    await correct(entries, org_id, events[5].event_id, CorrectionKind.AMEND)
    ids = [each.event_id for each in events]
    found = await entries.find_stored(org_id, ids)
    assert found.events == {each.event_id: stored(each, voided=each is events[4]) for each in events}
    assert found.generation is not None
    cache.add(org_id, found.generation, found.events.values())
    await cache.flush()
    assert await cache.read(org_id, found.generation, [new_uuid(), *ids, ids[0]]) == found.events


async def test_a_resend_needs_postgresql_only_where_nothing_was_confirmed_for_half_a_second(
    database: Database, entries: EntryStore, cache: KnownEventCache, clock: Seconds, org_id: OrgId
) -> None:
    first, second, third = (event(org_id, key) for key in ("first", "second", "third"))
    async with (
        FaultProxy("127.0.0.1", database.server.port) as proxy,
        open_pool(
            EmbeddedPostgres(Path("/nowhere"), proxy.port).url(database.name, user="usameter_ingest"),
            application_name="test",
        ) as pool,
    ):
        known = KnownEvents(entries=EntryStore(pool, slot=1), cache=cache, monotonic_seconds=clock)
        await record(entries, org_id, first)
        assert await known.find(org_id, [first.event_id]) == {first.event_id: stored(first)}
        # What is recorded where events are sent again is known without a look-up of its own.
        known.add(org_id, await record(entries, org_id, second), [second])
        await record(entries, org_id, third)
        await cache.flush()

        await proxy.cut()
        both = [first.event_id, second.event_id]
        clock.value += GENERATION_SECONDS - 0.001
        assert await known.find(org_id, both) == {each.event_id: stored(each) for each in (first, second)}
        with pytest.raises(Unavailable):
            await known.find(org_id, [*both, third.event_id])
        clock.value += 0.001
        with pytest.raises(Unavailable):
            await known.find(org_id, both)


async def test_who_sends_new_events_only_has_none_of_them_cached(
    entries: EntryStore, known: KnownEvents, cache: KnownEventCache, clock: Seconds, redis: Redis, org_id: OrgId
) -> None:
    events = [event(org_id, f"k{number}") for number in range(4)]

    async def send(sent: UsageEvent) -> None:
        assert not await known.find(org_id, [sent.event_id])
        known.add(org_id, await record(entries, org_id, sent), [sent])
        await cache.flush()

    await send(events[0])
    assert await cached_ids(redis, org_id) == set()
    await known.find(org_id, [events[0].event_id])
    clock.value += 59.999
    await send(events[1])
    assert await cached_ids(redis, org_id) == {events[0].event_id, events[1].event_id}
    clock.value += 0.001
    await send(events[2])
    assert await cached_ids(redis, org_id) == {events[0].event_id, events[1].event_id}


async def test_an_event_without_a_key_is_not_cached(
    entries: EntryStore, known: KnownEvents, cache: KnownEventCache, redis: Redis, org_id: OrgId
) -> None:
    keyed, keyless = event(org_id, "k"), event(org_id, None)
    await record(entries, org_id, keyed)
    await known.find(org_id, [keyed.event_id])
    known.add(org_id, await record(entries, org_id, keyless), [keyless])
    await cache.flush()
    assert await cached_ids(redis, org_id) == {keyed.event_id}


async def test_a_generation_ends_with_a_void_of_the_same_organization(entries: EntryStore, org_id: OrgId) -> None:
    other_org = OrgId(new_uuid())
    amended, voided, of_other = event(org_id, "a"), event(org_id, "v"), event(other_org, "o")
    before = await record(entries, org_id, amended, voided)
    before_of_other = await record(entries, other_org, of_other)
    await correct(entries, org_id, amended.event_id, CorrectionKind.AMEND)
    assert (await entries.find_stored(org_id, [voided.event_id])).generation == before
    await correct(entries, org_id, voided.event_id, CorrectionKind.VOID)
    after = await entries.find_stored(org_id, [voided.event_id])
    assert after.generation != before and after.events[voided.event_id].voided
    assert await record(entries, org_id, event(org_id, "later")) == after.generation
    assert (await entries.find_stored(other_org, [of_other.event_id])).generation == before_of_other


async def test_a_transaction_that_rolls_back_leaves_the_generation(
    entries: EntryStore, pool: Pool, org_id: OrgId
) -> None:
    known, new = event(org_id, "k"), event(org_id, "n")
    before = await record(entries, org_id, known)
    with pytest.raises(EventAlreadyStored):
        await record(entries, org_id, known, new)
    assert list((await entries.find_stored(org_id, [known.event_id, new.event_id])).events) == [known.event_id]
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            "SELECT ingest.record_correction($1, NULL, 0::smallint, $2, 'VOID', -1, 'r', '')", org_id, known.event_id
        )
        # Others do not see it yet, neither the void nor its generation.
        found = await entries.find_stored(org_id, [known.event_id])
        assert found.generation == before and not found.events[known.event_id].voided
        await transaction.rollback()
    assert (await entries.find_stored(org_id, [known.event_id])).generation == before


async def test_a_table_that_is_restored_in_place_starts_a_generation(
    database: Database, entries: EntryStore, org_id: OrgId
) -> None:
    kept = event(org_id, "kept")
    before = await record(entries, org_id, kept)
    await execute(database, "CREATE TABLE dump AS TABLE ingest.usage_event")
    await execute(database, "TRUNCATE ingest.usage_event CASCADE")
    await execute(database, "INSERT INTO ingest.usage_event TABLE dump")
    found = await entries.find_stored(org_id, [kept.event_id])
    assert list(found.events) == [kept.event_id] and found.generation != before


async def test_a_restored_server_never_meets_the_cache_of_what_it_has_forgotten(
    tmp_path_factory: pytest.TempPathFactory, cache: KnownEventCache, clock: Seconds, redis: Redis, org_id: OrgId
) -> None:
    """I1: an event that the database forgot is not answered as a duplicate, but recorded again."""
    home, port = tmp_path_factory.mktemp("restored"), free_port()
    kept, forgotten = event(org_id, "kept"), event(org_id, "forgotten")
    ids = [kept.event_id, forgotten.event_id]
    for life in range(2):
        async with EmbeddedPostgres(home, port, durable=False) as server:
            await server.ensure_database("restored")
            await migrate(server.url("restored"), schema="ingest", package="usameter_ingest")
            if life:
                admin = await asyncpg.connect(server.url("restored"))
                await admin.execute("DELETE FROM ingest.usage_event WHERE event_id = $1", forgotten.event_id)
                await admin.close()
            async with open_pool(server.url("restored", user="usameter_ingest"), application_name="test") as pool:
                entries = EntryStore(pool, slot=0)
                known = KnownEvents(entries=entries, cache=cache, monotonic_seconds=clock)
                if life:
                    clock.value += GENERATION_SECONDS
                    for _ in range(2):
                        assert list(await known.find(org_id, ids)) == [kept.event_id]
                        await cache.flush()
                    await record(entries, org_id, forgotten)
                else:
                    await record(entries, org_id, kept, forgotten)
                    await known.find(org_id, ids)
                    await cache.flush()
                    assert await cached_ids(redis, org_id) == set(ids)
                    assert set(await known.find(org_id, ids)) == set(ids)


async def test_a_void_is_answered_when_nobody_trusts_an_older_generation(
    entries: EntryStore, cache: KnownEventCache, org_id: OrgId
) -> None:
    """Both on real clocks: what was confirmed last before the void's commit is not acted upon after its answer."""
    known = KnownEvents(entries=entries, cache=cache)
    for number in range(3):
        sent = event(org_id, f"k{number}")
        await record(entries, org_id, sent)
        assert not (await known.find(org_id, [sent.event_id]))[sent.event_id].voided
        await cache.flush()
        await correct(entries, org_id, sent.event_id, CorrectionKind.VOID)
        assert (await known.find(org_id, [sent.event_id]))[sent.event_id].voided
        await cache.flush()
        assert (await known.find(org_id, [sent.event_id]))[sent.event_id].voided


async def test_a_look_up_confirms_what_was_true_when_it_began(
    database: Database, entries: EntryStore, known: KnownEvents, cache: KnownEventCache, clock: Seconds, org_id: OrgId
) -> None:
    """However long its answer takes: what has happened meanwhile it does not know."""
    sent = event(org_id, "k")
    await record(entries, org_id, sent)
    blocker = await asyncpg.connect(database.admin_url)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("LOCK TABLE ingest.usage_event")
    looking_up = asyncio.create_task(known.find(org_id, [sent.event_id]))

    async def waits() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND wait_event_type = 'Lock'"
        return bool(await fetch_value(database, query, database.name))

    await until(waits, "the look-up waits")
    clock.value += GENERATION_SECONDS
    await transaction.rollback()
    await blocker.close()
    await looking_up
    await cache.flush()
    from_cache = KNOWN_EVENTS.labels("cache")._value.get
    before = from_cache()
    await known.find(org_id, [sent.event_id])
    assert from_cache() == before
    await known.find(org_id, [sent.event_id])
    assert from_cache() == before + 1


async def test_a_void_is_known_also_where_another_event_was_looked_up_since(
    entries: EntryStore, known: KnownEvents, cache: KnownEventCache, clock: Seconds, org_id: OrgId
) -> None:
    voided, other = event(org_id, "v"), event(org_id, "o")
    await record(entries, org_id, voided, other)
    await known.find(org_id, [voided.event_id])
    await cache.flush()
    await correct(entries, org_id, voided.event_id, CorrectionKind.VOID)
    clock.value += GENERATION_SECONDS
    await known.find(org_id, [other.event_id])
    await cache.flush()
    assert await known.find(org_id, [voided.event_id]) == {voided.event_id: stored(voided, voided=True)}


async def test_the_cache_keeps_the_latest_and_no_more_than_two_hashes(
    cache: KnownEventCache, redis: Redis, org_id: OrgId, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_module, "_EVENTS_MAX", 3)
    events = [stored(event(org_id, f"k{number}")) for number in range(7)]
    for each in events:
        cache.add(org_id, "g", [each])
        await cache.flush()
    ids = [each.event_id for each in events]
    assert await cached_ids(redis, org_id) == set(ids[3:])
    assert list(await cache.read(org_id, "g", ids)) == ids[3:]
    assert await cache.read(org_id, "h", ids) == {}
    for key in (f"usameter:known:{{{org_id}}}:g", f"usameter:known:{{{org_id}}}:g:old"):
        assert 3_500 < await redis.ttl(key) <= 3_600


async def test_groups_of_any_size_pass_through_one_script(cache: KnownEventCache, org_id: OrgId) -> None:
    events = {each.event_id: each for each in (stored(event(org_id, f"k{number}")) for number in range(9_001))}
    cache.add(org_id, "g", events.values())
    await cache.flush()
    for asked in (1, 999, 1_000, 1_001, 9_001):
        ids = list(events)[:asked]
        assert await cache.read(org_id, "g", ids) == {each: events[each] for each in ids}


async def test_what_cannot_be_written_is_dropped_and_counted(database: Database, org_id: OrgId) -> None:
    events = [stored(event(org_id, f"k{number}")) for number in range(3)]
    dropped = partial(KNOWN_EVENTS_DROPPED._value.get)
    before = dropped()
    async with Redis.from_url(f"redis://127.0.0.1:{free_port()}/0") as redis:
        cache = KnownEventCache(redis, CircuitBreaker(dependency="redis", failure_types=(RedisError, OSError)))
        cache.add(org_id, "g", events)
        await cache.flush()
        assert dropped() == before + 3
        assert await cache.read(org_id, "g", [events[0].event_id]) == {}
        await cache.flush()
        assert dropped() == before + 3
        cache.add(org_id, "g", events * 33_333)
        cache.add(org_id, "g", events[:1])
        assert dropped() == before + 3, "a hundred thousand may wait"
        cache.add(org_id, "g", events[:1])
        assert dropped() == before + 4


async def test_the_role_of_ingest_may_ask_for_the_generation(database: Database, pool: Pool, org_id: OrgId) -> None:
    """It is what the superuser is told too: no part of it is hidden from the role."""
    query = "SELECT ingest.cache_generation($1)"
    generation = await pool.fetchval(query, org_id)
    assert generation == await fetch_value(database, query, org_id)
    assert len(generation.split(".")) == 4, "none of its parts is null"
