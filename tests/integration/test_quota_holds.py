"""Holds on a real PostgreSQL: what they take, what consumes them, and that nothing exceeds a limit in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from tests.support.quota import NOW, Bench, said
from usameter_core.errors import (
    FailedPrecondition,
    IdempotencyConflict,
    InvalidArgument,
    NotFound,
    QuotaExceeded,
    UsameterError,
)
from usameter_core.ids import ReservationId
from usameter_core.period import hour_start
from usameter_core.postgres.migrate import migrate
from usameter_core.postgres.pool import Pool, open_pool
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_quota import worker
from usameter_quota.domain.admission import Outcome, UsageItem
from usameter_quota.domain.holds import HoldState, hold_id_of
from usameter_quota.store.admission import AdmissionStore
from usameter_quota.store.holds import HoldStore
from usameter_quota.worker import KEPT_AFTER_CLOSING, ReservationPruner


@pytest.fixture(scope="module")
async def pool(postgres: EmbeddedPostgres) -> AsyncIterator[Pool]:
    """One database for all tests here: each has an organization of its own."""
    await postgres.ensure_database("quota_holds")
    await migrate(postgres.url("quota_holds"), schema="quota", package="usameter_quota")
    async with open_pool(postgres.url("quota_holds", user="usameter_quota"), application_name="test") as opened:
        yield opened


@pytest.fixture
def bench(pool: Pool) -> Bench:
    return Bench(pool)


@pytest.fixture
async def lone_bench(database: Any) -> AsyncIterator[Bench]:
    """In a database of its own, for what looks at all organizations."""
    async with open_pool(database.role_url("quota"), application_name="test") as opened:
        yield Bench(opened)


async def state(bench: Bench, name: str = "h") -> HoldState:
    return (await bench.holds.get(bench.caller.org_id, name)).state


async def cancel(bench: Bench, name: str = "h") -> HoldState:
    return (await bench.holds.cancel(bench.caller.org_id, name)).state


async def hours(bench: Bench) -> dict[datetime, Decimal]:
    rows = await bench.pool.fetch(
        "SELECT hour, quantity FROM quota.usage_hour WHERE org_id = $1 AND quantity > 0", bench.caller.org_id
    )
    await bench.counted()
    return {row["hour"]: row["quantity"] for row in rows}


async def test_a_hold_counts_until_it_is_cancelled(bench: Bench) -> None:
    await bench.limit("10")
    hold = await bench.hold("8.5")
    assert (hold.state, hold.created_at, [each.kind.value for each in hold.warnings]) == (
        *(HoldState.HELD, NOW),
        ["QUOTA_SOFT_LIMIT"],
    )
    quota = await bench.quota()
    assert (quota.current, quota.reserved) == (Decimal("8.5"), Decimal("8.5"))
    assert said(await bench.use("2")) == "DENY"
    assert await cancel(bench) == HoldState.CANCELLED
    assert await cancel(bench) == HoldState.CANCELLED
    assert await bench.current() == 0


async def test_one_over_the_limit_is_refused_and_its_id_stays_free(bench: Bench) -> None:
    await bench.limit("10")
    with pytest.raises(QuotaExceeded) as caught:
        await bench.hold("10.000001")
    (violation,) = caught.value.violations
    assert (violation.limit, violation.current, violation.requested) == (10, 0, Decimal("10.000001"))
    assert await bench.current() == 0
    with pytest.raises(NotFound):
        await state(bench)
    assert (await bench.hold("10")).state == HoldState.HELD


async def test_the_same_id_is_the_same_reservation_and_other_terms_are_a_conflict(bench: Bench) -> None:
    await bench.limit("10")
    first = await bench.hold("9")
    bench.clock.moment += timedelta(minutes=1)
    assert await bench.hold("9") == first, "also where there is no room for another"
    for other in ({"quantity": "8"}, {"quantity": "9", "tenant_id": "u"}, {"quantity": "9", "ttl": timedelta(1)}):
        with pytest.raises(IdempotencyConflict):
            await bench.hold(**other)  # type: ignore[arg-type]
    assert await bench.current() == 9


async def test_a_reserve_that_comes_after_its_cancellation_takes_nothing(bench: Bench) -> None:
    assert await cancel(bench) == HoldState.CANCELLED
    hold = await bench.holds.get(bench.caller.org_id, "h")
    assert (hold.terms, hold.warnings) == (None, [])
    with pytest.raises(FailedPrecondition, match="CANCELLED"):
        await bench.hold("1")
    assert await bench.counted() == []


async def test_a_reservation_that_is_no_longer_held_is_not_answered_as_if_it_were(bench: Bench) -> None:
    await bench.hold("1")
    await cancel(bench)
    with pytest.raises(FailedPrecondition) as caught:
        await bench.hold("1")
    assert caught.value.condition == "RESERVATION_CLOSED"


@pytest.mark.parametrize(("quantity", "verdict", "between", "committed"), [
    ("4", "ALLOW", "6", "4"),
    ("6", "ALLOW", "6", "6"),
    ("10", "QUOTA_SOFT_LIMIT", "10", "10"),
    ("10.000001", "DENY", "6", None),
])  # fmt: skip
async def test_only_what_exceeds_a_hold_is_taken_anew(
    bench: Bench, quantity: str, verdict: str, between: str, committed: str | None
) -> None:
    """I4: while it is not known whether the event is stored, the larger of the two counts."""
    await bench.limit("10")
    await bench.hold("6")
    reservation_id = ReservationId(uuid4())
    assert said(await bench.claim(quantity, reservation_id=reservation_id)) == verdict
    assert await bench.current() == Decimal(between)
    if committed is None:
        assert await state(bench) == HoldState.HELD
        return
    with pytest.raises(FailedPrecondition, match="ask again"):
        await cancel(bench)
    await bench.settle(reservation_id, Outcome.COMMITTED)
    await bench.settle(reservation_id, Outcome.COMMITTED)
    assert await bench.current() == Decimal(committed)
    assert (await bench.quota()).reserved == 0
    assert await state(bench) == HoldState.CONSUMED
    with pytest.raises(FailedPrecondition) as caught:
        await cancel(bench)
    assert caught.value.condition == "RESERVATION_CONSUMED"


@pytest.mark.parametrize("quantity", ["4", "6", "9"])
async def test_an_event_that_is_not_stored_leaves_the_hold_as_it_was(bench: Bench, quantity: str) -> None:
    await bench.limit("10")
    await bench.hold("6")
    for _ in range(2):
        reservation_id = ReservationId(uuid4())
        assert (await bench.claim(quantity, reservation_id=reservation_id)).admitted
        await bench.settle(reservation_id, Outcome.ABORTED)
        assert await bench.current() == 6
        assert await state(bench) == HoldState.HELD
    assert await cancel(bench) == HoldState.CANCELLED
    assert await bench.current() == 0


@pytest.mark.parametrize("outcome", Outcome)
async def test_within_a_period_the_event_counts_in_its_own_hour_from_the_claim_on(
    bench: Bench, outcome: Outcome
) -> None:
    """I4: nothing grows after the claim, whatever becomes of it, so no limit that is set meanwhile is exceeded."""
    await bench.limit("10")
    await bench.hold("6")
    bench.clock.moment += timedelta(hours=2)
    reservation_id = ReservationId(uuid4())
    assert (await bench.claim("7", reservation_id=reservation_id)).admitted
    later = hour_start(bench.clock.moment)
    assert await hours(bench) == {later: 7}
    await bench.settle(reservation_id, outcome)
    assert await hours(bench) == {later: 7 if outcome is Outcome.COMMITTED else 6}


@pytest.mark.parametrize("outcome", Outcome)
async def test_a_hold_of_another_period_brings_nothing_and_is_consumed_all_the_same(
    bench: Bench, outcome: Outcome
) -> None:
    await bench.limit("10", period="HOURLY")
    await bench.hold("6")
    made, bench.clock.moment = hour_start(NOW), NOW + timedelta(hours=1)
    assert said(await bench.claim("11")) == "DENY"
    reservation_id = ReservationId(uuid4())
    assert (await bench.claim("10", reservation_id=reservation_id)).admitted
    assert await hours(bench) == {made: 6, hour_start(bench.clock.moment): 10}
    await bench.settle(reservation_id, outcome)
    committed = outcome is Outcome.COMMITTED
    assert await hours(bench) == ({hour_start(bench.clock.moment): 10} if committed else {made: 6})
    assert await state(bench) == (HoldState.CONSUMED if committed else HoldState.HELD)


async def test_a_hold_outside_the_rolling_window_brings_nothing_to_an_event_within(bench: Bench) -> None:
    await bench.limit("10", period="ROLLING_30D")
    await bench.hold("6")
    bench.clock.moment += timedelta(days=30)
    assert said(await bench.claim("11")) == "DENY"
    assert said(await bench.claim("10")) == "QUOTA_SOFT_LIMIT"


async def test_a_limit_that_was_lowered_since_does_not_refuse_what_is_held(bench: Bench) -> None:
    """I4: no admission takes the counter above; it is there already."""
    await bench.limit("10")
    await bench.hold("6")
    await bench.limit("5")
    assert said(await bench.claim("6.000001")) == "DENY"
    reservation_id = ReservationId(uuid4())
    assert said(await bench.claim("6", reservation_id=reservation_id)) == "ALLOW"
    await bench.settle(reservation_id, Outcome.COMMITTED)
    assert await bench.current() == 6


async def test_the_second_event_that_names_a_hold_is_checked_as_if_it_named_none(bench: Bench) -> None:
    await bench.limit("10")
    await bench.hold("6")
    first = ReservationId(uuid4())
    assert (await bench.claim("6", reservation_id=first)).admitted
    assert said(await bench.claim("5")) == "DENY"
    assert (await bench.claim("3")).admitted
    await bench.settle(first, Outcome.COMMITTED)
    assert await bench.current() == 9
    assert said(await bench.claim("2")) == "DENY", "nor does one that is consumed bring anything"


async def test_of_one_group_the_first_to_name_a_hold_has_it(bench: Bench) -> None:
    await bench.limit("10")
    await bench.hold("6")
    item = UsageItem("t", "e", hour_start(NOW), Decimal(5), claims=hold_id_of(bench.caller.org_id, "h"))
    reservation_id = ReservationId(uuid4())
    verdicts = await bench.admissions.reserve(bench.caller.org_id, reservation_id, [[item], [item], [item]])
    # 6 held, of which the first has 5; the second would need 5 more than the 4 that are left.
    assert [said(verdict) for verdict in verdicts] == ["ALLOW", "DENY", "DENY"]
    await bench.settle(reservation_id, Outcome.COMMITTED)
    assert await bench.current() == 5


async def test_a_request_that_is_refused_claims_nothing(bench: Bench) -> None:
    await bench.limit("10")
    await bench.limit("0", tenant_id="full")
    await bench.hold("6")
    item = UsageItem("t", "e", hour_start(NOW), Decimal(5), claims=hold_id_of(bench.caller.org_id, "h"))
    full = UsageItem("full", "e", hour_start(NOW), Decimal(1))
    verdicts = await bench.admissions.reserve(bench.caller.org_id, ReservationId(uuid4()), [[item, full]])
    assert [said(verdict) for verdict in verdicts] == ["DENY"]
    assert (await state(bench), await bench.current()) == (HoldState.HELD, 6)
    assert await cancel(bench) == HoldState.CANCELLED


async def test_a_repeated_reserve_gets_the_first_verdicts_and_claims_once(bench: Bench) -> None:
    await bench.limit("10")
    await bench.hold("6")
    reservation_id = ReservationId(uuid4())
    verdicts = [await bench.claim("9", reservation_id=reservation_id) for _ in range(2)]
    assert verdicts[0] == verdicts[1]
    assert await bench.current() == 9


@pytest.mark.parametrize("closed", [False, True])
async def test_a_hold_of_another_tenant_is_an_error_that_names_it(bench: Bench, closed: bool) -> None:
    await bench.hold("6", tenant_id="other")
    if closed:
        await cancel(bench)
    with pytest.raises(InvalidArgument, match="h is of another tenant or event type"):
        await bench.claim("1")
    assert await bench.counted() == [("other", 0 if closed else 6)]


async def test_an_unknown_or_cancelled_hold_is_the_same_as_none(bench: Bench) -> None:
    await bench.limit("10")
    await cancel(bench, "tombstone")
    for name in ("unknown", "tombstone"):
        assert said(await bench.claim("11", name=name)) == "DENY"
        assert (await bench.claim("1", name=name)).admitted


async def test_what_expired_is_given_back_once_and_brings_nothing(lone_bench: Bench) -> None:
    await lone_bench.limit("10")
    await lone_bench.hold("6", ttl=timedelta(seconds=1))
    await lone_bench.hold("1", name="later", ttl=timedelta(seconds=2))
    assert await lone_bench.expire_holds() == 0
    lone_bench.clock.moment += timedelta(seconds=1)
    assert sorted(await asyncio.gather(*[lone_bench.expire_holds() for _ in range(4)])) == [0, 0, 0, 1]
    assert (await state(lone_bench), await state(lone_bench, "later")) == (HoldState.EXPIRED, HoldState.HELD)
    assert await lone_bench.current() == 1
    assert said(await lone_bench.claim("10")) == "DENY"
    assert await cancel(lone_bench) == HoldState.EXPIRED


@pytest.mark.parametrize(("outcome", "left"), [(Outcome.COMMITTED, 4), (Outcome.ABORTED, 0)])
async def test_a_claimed_hold_expires_only_if_its_event_is_not_stored(
    lone_bench: Bench, outcome: Outcome, left: int
) -> None:
    await lone_bench.limit("10")
    await lone_bench.hold("6", ttl=timedelta(seconds=1))
    reservation_id = ReservationId(uuid4())
    await lone_bench.claim("4", reservation_id=reservation_id)
    lone_bench.clock.moment += timedelta(minutes=1)
    assert await lone_bench.expire_holds() == 0
    assert await lone_bench.current() == 6
    await lone_bench.settle(reservation_id, outcome)
    assert await lone_bench.expire_holds() == (1 if outcome is Outcome.ABORTED else 0)
    assert await lone_bench.current() == left


async def test_what_expires_is_found_page_by_page(lone_bench: Bench) -> None:
    names = ["a", "b", "c", "later"]
    for name in names:
        await lone_bench.hold("1", name=name, ttl=timedelta(minutes=2 if name == "later" else 1))
    store, until = HoldStore(lone_bench.pool), NOW + timedelta(minutes=2)
    pages = [await store.list_due(until=until, after=None, limit=2)]
    while pages[-1]:
        pages.append(await store.list_due(until=until, after=pages[-1][-1], limit=2))
    assert [len(page) for page in pages] == [2, 2, 0]
    found = [due.hold_id for page in pages for due in page]
    assert sorted(found[:3]) == sorted(hold_id_of(lone_bench.caller.org_id, name) for name in names[:3])
    assert found[3] == hold_id_of(lone_bench.caller.org_id, "later")
    assert await store.list_due(until=until - timedelta(microseconds=1), after=pages[0][-1], limit=2) == pages[1][:1]


async def test_what_cannot_be_given_back_keeps_no_other_waiting(
    lone_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of its organization, and not of any other; it stays until its counter is repaired."""
    other = Bench(lone_bench.pool, lone_bench.clock)
    for name in ("h", "more"):
        await lone_bench.hold("3", name=name, tenant_id="broken", ttl=timedelta(minutes=1))
    await lone_bench.hold("3", name="sound", ttl=timedelta(minutes=1))
    await other.hold("3", ttl=timedelta(minutes=2))
    use = "UPDATE quota.{} SET quantity = {} WHERE tenant_id = 'broken'"
    for table in ("usage_hour", "usage_day"):
        await lone_bench.pool.execute(use.format(table, 0))
    lone_bench.clock.moment += timedelta(hours=1)
    violations = REGISTRY.get_sample_value("usameter_invariant_violations_total", {"invariant": "I4"}) or 0
    with capture_logs() as logs:
        assert await lone_bench.expire_holds() == 2
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["hold_below_zero"] * 2
    assert REGISTRY.get_sample_value("usameter_invariant_violations_total", {"invariant": "I4"}) == violations + 2
    assert await state(other) == await state(lone_bench, "sound") == HoldState.EXPIRED
    assert await state(lone_bench) == await state(lone_bench, "more") == HoldState.HELD
    # Nor where a batch is full of such.
    monkeypatch.setattr(worker, "_BATCH_HEADS_MAX", 1)
    await other.hold("3", name="late", ttl=timedelta(seconds=1))
    lone_bench.clock.moment += timedelta(minutes=1)
    assert await lone_bench.expire_holds() == 1
    for table in ("usage_hour", "usage_day"):
        await lone_bench.pool.execute(use.format(table, 6))
    assert await lone_bench.expire_holds() == 2


async def test_holds_are_no_business_of_the_janitor_and_forgotten_a_day_after_they_close(lone_bench: Bench) -> None:
    await lone_bench.hold("6")
    await cancel(lone_bench, "other")
    assert await lone_bench.admissions.list_open_reservations(min_age=timedelta(0), limit=10) == []
    pruner = ReservationPruner(clock=lone_bench.clock, store=AdmissionStore(lone_bench.pool))
    lone_bench.clock.moment += KEPT_AFTER_CLOSING + timedelta(seconds=1)
    assert await pruner.prune() == 1
    assert await state(lone_bench) == HoldState.HELD
    with pytest.raises(NotFound):
        await state(lone_bench, "other")


async def test_what_is_held_is_not_stored_and_starts_nothing_until_its_event_is(bench: Bench) -> None:
    await bench.limit("10", "SOFT", grace=1)
    await bench.hold("11")
    assert await bench.happened() == []
    reservation_id = ReservationId(uuid4())
    await bench.claim("11", reservation_id=reservation_id)
    assert await bench.happened() == []
    await bench.settle(reservation_id, Outcome.COMMITTED)
    assert await bench.happened() == ["SOFT_LIMIT_REACHED", "LIMIT_REACHED", "GRACE_STARTED"]


async def test_a_hold_that_a_new_default_refuses_records_what_use_has_reached(bench: Bench) -> None:
    await bench.store("10")
    await bench.default("10")
    assert await bench.happened() == []
    with pytest.raises(QuotaExceeded):
        await bench.hold("1")
    assert await bench.happened() == ["SOFT_LIMIT_REACHED", "LIMIT_REACHED"]
    with pytest.raises(QuotaExceeded):
        await bench.hold("1")
    assert len(await bench.events()) == 2


async def test_racing_holds_claims_cancellations_and_expiries_never_exceed_the_limit(lone_bench: Bench) -> None:
    """I4: under HARD the counter is at most the limit at every moment, and what is stored in the end."""
    await lone_bench.limit("20")
    stored = 0
    highest = Decimal(0)

    async def client(number: int) -> None:
        nonlocal stored
        for turn in range(6):
            name = f"{number % 5}.{turn}"
            try:
                await lone_bench.hold("2", name=name, ttl=timedelta(seconds=1 if turn % 2 else 60))
            except UsameterError as error:
                assert isinstance(error, QuotaExceeded | FailedPrecondition)
            if number % 3 == 0:
                await asyncio.gather(cancel(lone_bench, name), lone_bench.expire_holds(), return_exceptions=True)
            reservation_id = ReservationId(uuid4())
            quantity = 1 + number % 3
            verdict = await lone_bench.claim(str(quantity), name=name, reservation_id=reservation_id)
            commits = verdict.admitted and (number + turn) % 4 == 0
            await lone_bench.settle(reservation_id, Outcome.COMMITTED if commits else Outcome.ABORTED)
            stored += quantity if commits else 0

    async def watch() -> None:
        nonlocal highest
        while True:
            highest = max(highest, await lone_bench.current())

    watching = asyncio.create_task(watch())
    lone_bench.clock.moment += timedelta(seconds=1)
    await asyncio.gather(*[client(number) for number in range(12)])
    lone_bench.clock.moment += timedelta(minutes=5)
    await lone_bench.expire_holds()
    watching.cancel()
    assert stored and highest <= 20
    quota = await lone_bench.quota()
    assert (quota.current, quota.reserved) == (stored, 0)
