"""Grace, and what is written when a line of a limit is reached; with a clock that is set by hand."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import uuid4

from tests.support.quota import NOW, Bench, said
from tests.support.quota_lines import check, is_waited, reserved
from tests.support.wait import until
from usameter_core.ids import ReservationId
from usameter_core.period import hour_start
from usameter_core.postgres.pool import Pool
from usameter_quota.domain.admission import Adjustment, Outcome
from usameter_quota.domain.quota_events import QuotaEvent, QuotaEventFilter
from usameter_quota.service.quota_events import QuotaEventService
from usameter_quota.store.limits import LimitStore
from usameter_quota.store.quota_events import QuotaEventStore
from usameter_quota.worker import CLOCK_SKEW_MAX, PeriodEnder

FEBRUARY = datetime(2026, 2, 1, tzinfo=UTC)
INSTANT = timedelta(microseconds=1)
SMALLEST = "0.000001"


async def test_a_soft_limit_with_grace_lets_through_until_the_grace_has_ended(bench: Bench) -> None:
    await bench.limit("10", "SOFT", grace=24)
    assert said(await bench.store("8")) == "ALLOW"
    assert said(await bench.store("2")) == "QUOTA_SOFT_LIMIT"
    assert (await bench.quota()).grace_ends_at is None, "at the limit, not above it"
    assert said(await bench.store(SMALLEST)) == "QUOTA_EXCEEDED"
    end = NOW + timedelta(hours=24)
    assert (await bench.quota()).grace_ends_at == end
    bench.clock.moment = end - INSTANT
    assert said(await bench.store("5")) == "QUOTA_EXCEEDED"
    bench.clock.moment = end
    assert not await check(bench, SMALLEST)
    (violation,) = (await bench.store(SMALLEST)).violations
    assert (violation.current, violation.reset_at) == (Decimal("15.000001"), FEBRUARY)
    assert (await bench.quota()).grace_ends_at == end
    bench.clock.moment = FEBRUARY - INSTANT
    assert said(await bench.store(SMALLEST)) == "DENY"
    bench.clock.moment = FEBRUARY
    assert (await bench.quota()).grace_ends_at is None
    assert said(await bench.store("11")) == "QUOTA_EXCEEDED", "a new period, a new grace"
    assert (await bench.quota()).grace_ends_at == FEBRUARY + timedelta(hours=24)


async def test_what_fits_again_after_a_correction_is_let_through_even_when_the_grace_has_ended(bench: Bench) -> None:
    await bench.limit("10", "SOFT", grace=1)
    await bench.store("11")
    bench.clock.moment += timedelta(hours=1)
    assert said(await bench.store("1")) == "DENY"
    back = Adjustment(uuid4(), "t", "e", hour_start(NOW), Decimal(-3))
    await bench.admissions.adjust({bench.caller.org_id: [back]})
    assert said(await bench.store("2")) == "QUOTA_SOFT_LIMIT"
    assert said(await bench.store(SMALLEST)) == "DENY", "a period has one grace"


async def test_a_grace_ends_with_its_period(bench: Bench) -> None:
    await bench.limit("10", "SOFT", "HOURLY", grace=24)
    await bench.store("11")
    assert (await bench.quota()).grace_ends_at == hour_start(NOW) + timedelta(hours=1)
    bench.clock.moment = hour_start(NOW) + timedelta(hours=1)
    assert (await bench.quota()).grace_ends_at is None
    assert said(await bench.store("10")) == "QUOTA_SOFT_LIMIT"
    # What comes late for that hour is let through, and starts nothing.
    before = await bench.happened()
    late = await bench.store("50", at=NOW)
    assert (said(late), late.warnings[0].reset_at) == ("QUOTA_EXCEEDED", None)
    assert await bench.happened() == before


async def test_only_stored_use_starts_a_grace(bench: Bench) -> None:
    await bench.limit("10", "SOFT", grace=1)
    aborted = await reserved(bench, "20")
    quota = await bench.quota()
    assert (quota.current, quota.reserved, quota.remaining, quota.grace_ends_at) == (20, 20, 0, None)
    await bench.settle(aborted, Outcome.ABORTED)
    bench.clock.moment += timedelta(hours=5)
    assert said(await bench.use("11")) == "QUOTA_EXCEEDED"
    assert await bench.happened() == []


async def test_the_commit_that_takes_stored_use_over_a_line_writes_the_events(bench: Bench) -> None:
    await bench.limit("10", "SOFT", grace=1)
    early = await reserved(bench, "7")
    late = await reserved(bench, "5")
    await bench.settle(late, Outcome.COMMITTED)
    assert await bench.happened() == []
    bench.clock.moment += timedelta(minutes=5)
    # Reserved when no line was near, committed when it makes 12 of 10.
    await bench.settle(early, Outcome.COMMITTED)
    soft, limit, grace = await bench.events()
    assert [each.type.value for each in (soft, limit, grace)] == [
        "SOFT_LIMIT_REACHED",
        "LIMIT_REACHED",
        "GRACE_STARTED",
    ]
    assert {(each.occurred_at, each.stored, each.limit_value) for each in (soft, limit, grace)} == {
        (bench.clock.moment, Decimal(12), Decimal(10))
    }
    assert (limit.period_start, limit.period_end) == (datetime(2026, 1, 1, tzinfo=UTC), FEBRUARY)
    assert [each.grace_ends_at for each in (soft, limit, grace)] == [None, None, NOW + timedelta(hours=1, minutes=5)]


async def test_a_commit_under_way_is_waited_for_by_the_reserve_that_comes_to_a_line(
    bench: Bench, replica: Pool
) -> None:
    """Else the two commits do not see each other, and neither writes the events."""
    await bench.limit("10", "SOFT", grace=1)
    early = await reserved(bench, "7")
    async with replica.acquire() as connection:
        async with connection.transaction():
            await connection.execute(
                "SELECT quota.settle($1, $2, $3, '{COMMITTED}')", bench.caller.org_id, NOW, [early]
            )
            reserving = asyncio.create_task(reserved(bench, "5"))
            await until(lambda: is_waited(connection), "the reserve waits")
        await bench.settle(await reserving, Outcome.COMMITTED)
    assert [each.stored for each in await bench.events()] == [12, 12, 12]


async def test_a_commit_that_was_marked_while_it_waited_looks_what_it_has_reached(bench: Bench, replica: Pool) -> None:
    await bench.limit("10", "SOFT", grace=1)
    early, late = await reserved(bench, "7"), ReservationId(uuid4())
    async with replica.acquire() as connection:
        async with connection.transaction():
            await connection.execute(
                """
                SELECT quota.reserve(
                    $1, $2, $3, 1, '{t}', '{e}', ARRAY[$4::timestamptz], '{5}', '{0}', '{1}', '{5}', '{}', '{}'
                )
                """,
                *(bench.caller.org_id, late, NOW, hour_start(NOW)),
            )
            # It has seen no mark, and waits for the reservation that the reserve has marked.
            settling = asyncio.create_task(bench.settle(early, Outcome.COMMITTED))
            await until(lambda: is_waited(connection), "the commit waits")
            await connection.execute("SELECT quota.settle($1, $2, $3, '{COMMITTED}')", bench.caller.org_id, NOW, [late])
        await settling
    assert [each.stored for each in await bench.events()] == [12, 12, 12]


async def test_a_commit_that_was_marked_while_it_waited_waits_for_the_head_too(bench: Bench, replica: Pool) -> None:
    """Else it and another that has the head see each other open, and neither writes the events."""
    await bench.limit("10", "SOFT", grace=1)
    early, late = await reserved(bench, "7"), ReservationId(uuid4())
    async with replica.acquire() as reserving, replica.acquire() as committing, committing.transaction():
        async with reserving.transaction():
            await reserving.execute(
                """
                SELECT quota.reserve(
                    $1, $2, $3, 1, '{t}', '{e}', ARRAY[$4::timestamptz], '{5}', '{0}', '{1}', '{5}', '{}', '{}'
                )
                """,
                *(bench.caller.org_id, late, NOW, hour_start(NOW)),
            )
            settling = asyncio.create_task(bench.settle(early, Outcome.COMMITTED))
            await until(lambda: is_waited(reserving), "the first commit waits")
            locking = asyncio.create_task(
                committing.execute("SELECT quota.lock_heads($1, '{t}', '{e}')", bench.caller.org_id)
            )
            await until(lambda: is_waited(reserving, by=2), "the second waits for the head")
        await locking
        await until(lambda: is_waited(reserving), "the first waits for the head, which the second has")
        await committing.execute("SELECT quota.settle($1, $2, $3, '{COMMITTED}')", bench.caller.org_id, NOW, [late])
    await settling
    assert [each.stored for each in await bench.events()] == [12, 12, 12]


async def test_each_line_is_reached_once_in_a_period_at_it_and_not_below(bench: Bench) -> None:
    await bench.limit("10")
    await bench.store("7.999999")
    assert await bench.happened() == []
    await bench.store(SMALLEST)
    assert await bench.happened() == ["SOFT_LIMIT_REACHED"]
    await bench.store("1.999999")
    assert await bench.happened() == ["SOFT_LIMIT_REACHED"]
    await bench.store(SMALLEST)
    both = ["SOFT_LIMIT_REACHED", "LIMIT_REACHED"]
    assert await bench.happened() == both
    down, up = (Adjustment(uuid4(), "t", "e", hour_start(NOW), Decimal(quantity)) for quantity in ("-5", "20"))
    await bench.admissions.adjust({bench.caller.org_id: [down]})
    await bench.store("5")
    await bench.admissions.adjust({bench.caller.org_id: [up]})
    assert await bench.happened() == both


async def test_an_upward_correction_reaches_lines_too(bench: Bench) -> None:
    await bench.limit("10", "SOFT", grace=1)
    open_one = await reserved(bench, "4")
    await bench.admissions.adjust({bench.caller.org_id: [Adjustment(uuid4(), "t", "e", hour_start(NOW), Decimal(9))]})
    assert await bench.happened() == ["SOFT_LIMIT_REACHED"]
    await bench.settle(open_one, Outcome.COMMITTED)
    assert await bench.happened() == ["SOFT_LIMIT_REACHED", "LIMIT_REACHED", "GRACE_STARTED"]


async def test_a_changed_limit_is_another_limit(bench: Bench) -> None:
    await bench.limit("10", "SOFT", grace=1)
    await bench.store("11")
    bench.clock.moment += timedelta(hours=2)
    assert said(await bench.use("1")) == "DENY"
    await bench.limit("10", "SOFT", grace=2)
    assert (await bench.quota()).grace_ends_at == bench.clock.moment + timedelta(hours=2), "it is above from the start"
    assert (await bench.happened())[3:] == ["SOFT_LIMIT_REACHED", "LIMIT_REACHED", "GRACE_STARTED"]
    await bench.limit("100", "SOFT", grace=2)
    assert (await bench.quota()).grace_ends_at is None
    await bench.limit("100", "SOFT", grace=2)
    assert len(await bench.happened()) == 6, "equal terms are no change"
    await bench.limit("11", "DISABLED")
    assert len(await bench.happened()) == 6


async def test_a_period_in_which_the_limit_was_reached_is_reset_once_whoever_comes_first(
    bench: Bench, replica: Pool
) -> None:
    await bench.limit("10", tenant_id="t")
    await bench.limit("10", tenant_id="u")
    await bench.store("10")
    await bench.store("9", tenant_id="u")
    bench.clock.moment = FEBRUARY + CLOCK_SKEW_MAX - INSTANT
    enders = [PeriodEnder(clock=bench.clock, store=LimitStore(pool)) for pool in (bench.pool, replica)]
    await asyncio.gather(*[ender.end_periods() for ender in enders])
    assert "RESET" not in await bench.happened()
    bench.clock.moment += INSTANT
    async with replica.acquire() as connection:
        async with connection.transaction():
            await connection.execute("SELECT quota.lock_heads($1, '{t}', '{e}')", bench.caller.org_id)
            ending = asyncio.gather(*[ender.end_periods() for ender in enders])
            await until(lambda: is_waited(connection, by=2), "both replicas have found it")
        await ending
    assert await bench.happened() == ["SOFT_LIMIT_REACHED", "LIMIT_REACHED", "RESET"]
    assert await bench.happened("u") == ["SOFT_LIMIT_REACHED"]
    reset = (await bench.events())[-1]
    assert (reset.occurred_at, reset.period_end, reset.stored) == (FEBRUARY, FEBRUARY, Decimal(10))
    await bench.store("10")
    assert (await bench.happened())[3:] == ["SOFT_LIMIT_REACHED", "LIMIT_REACHED"]


async def test_the_rolling_window_resets_on_the_day_its_use_is_below_the_limit_again(bench: Bench) -> None:
    await bench.limit("10", "SOFT", "ROLLING_30D", grace=48)
    await bench.store("3")
    bench.clock.moment = NOW + timedelta(days=1)
    await bench.store("8")
    assert (await bench.quota()).grace_ends_at == NOW + timedelta(days=3), "past the next midnight"
    bench.clock.moment = NOW + timedelta(days=3)
    await bench.end_periods()
    assert said(await bench.store("1")) == "DENY"
    reached = ["SOFT_LIMIT_REACHED", "LIMIT_REACHED", "GRACE_STARTED"]
    assert await bench.happened() == reached
    bench.clock.moment = datetime(2026, 2, 13, tzinfo=UTC)
    await bench.end_periods()
    assert await bench.happened() == reached
    # The 3 of January 15 leave the window: 8 of 10 are left.
    bench.clock.moment = datetime(2026, 2, 14, tzinfo=UTC)
    await bench.end_periods()
    assert await bench.happened() == [*reached, "RESET"]
    reset = (await bench.events())[-1]
    assert (reset.occurred_at, reset.stored) == (datetime(2026, 2, 14, tzinfo=UTC), Decimal(8))
    assert said(await bench.store("3")) == "QUOTA_EXCEEDED"
    assert await bench.happened() == [*reached, "RESET", "LIMIT_REACHED", "GRACE_STARTED"], "the warning line was kept"


async def test_racing_commits_and_aborts_write_each_event_once(bench: Bench, replica: Pool) -> None:
    dice = random.Random(20261122)
    sides = [bench, Bench(replica, bench.clock, bench.caller)]
    await bench.default("60", "SOFT", grace=1)
    tenants = [f"t{number}" for number in range(4)]

    async def work(side: Bench) -> None:
        for _ in range(25):
            reservation_id = ReservationId(uuid4())
            await side.reserve(
                *[[(tenant, "e", "1")] for tenant in dice.sample(tenants, 3)], reservation_id=reservation_id
            )
            await side.settle(reservation_id, dice.choice([Outcome.COMMITTED, Outcome.COMMITTED, Outcome.ABORTED]))

    await asyncio.gather(*[work(side) for side in sides * 4])
    for tenant in tenants:
        stored = (await bench.quota(tenant)).current
        assert stored > 60, "else this shows nothing"
        assert await bench.happened(tenant) == ["SOFT_LIMIT_REACHED", "LIMIT_REACHED", "GRACE_STARTED"]
        assert [each.stored for each in await bench.events() if each.tenant_id == tenant] == [48, 60, 61]


async def test_a_watcher_sees_every_event_once_and_in_order_while_others_write(bench: Bench, replica: Pool) -> None:
    await bench.default("1")
    service = QuotaEventService(store=QuotaEventStore(replica))
    seen: list[QuotaEvent] = []

    async def watch(*, stop_after: int) -> None:
        after = seen[-1].position if seen else 0
        async for event in service.watch(bench.caller.org_id, QuotaEventFilter(), after=after):
            seen.append(event)
            if len(seen) >= stop_after:
                return

    async def write(number: int) -> None:
        for _ in range(10):
            await bench.store("1", tenant_id=f"t{number}_{uuid4()}")

    writing = asyncio.gather(*[write(number) for number in range(8)])
    # It leaves and comes back, with the last position it has.
    for stop_after in (7, 50, 51, 160):
        await watch(stop_after=stop_after)
    await writing
    assert [event.position for event in seen] == list(range(1, 161))
    assert seen == await bench.events()


async def test_a_watcher_gets_what_it_asked_for_and_ends_when_the_service_stops(bench: Bench) -> None:
    service = QuotaEventService(store=QuotaEventStore(bench.pool))
    seen: list[tuple[str, str]] = []

    async def watch() -> None:
        wanted = QuotaEventFilter(tenant_id="u", event_type="e")
        async for event in service.watch(bench.caller.org_id, wanted, after=0):
            seen.append((event.tenant_id, event.type.value))

    watching = asyncio.create_task(watch())
    await bench.default("10")
    await bench.store("10")
    await bench.store("8", tenant_id="u")

    async def is_seen() -> bool:
        return seen == [("u", "SOFT_LIMIT_REACHED")]

    await until(is_seen, "the event is seen")
    service.stop_watching()
    async with asyncio.timeout(5):
        await watching
