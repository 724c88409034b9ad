"""Limits and reservations on a real PostgreSQL, with a clock that is set by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.support.quota import NOW, Bench, said
from usameter_core.errors import FailedPrecondition, Internal, NotFound
from usameter_core.ids import ReservationId
from usameter_core.period import hour_start
from usameter_core.postgres.migrate import migrate
from usameter_core.postgres.pool import Pool, open_pool
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_quota.domain.admission import Adjustment, FindingKind, Outcome, UsageItem, Verdict
from usameter_quota.store.admission import AdmissionStore
from usameter_quota.worker import KEPT_AFTER_CLOSING, ReservationPruner


@pytest.fixture(scope="module")
async def pool(postgres: EmbeddedPostgres) -> AsyncIterator[Pool]:
    """One database for all tests here: each has an organization of its own."""
    await postgres.ensure_database("quota_service")
    await migrate(postgres.url("quota_service"), schema="quota", package="usameter_quota")
    async with open_pool(postgres.url("quota_service", user="usameter_quota"), application_name="test") as opened:
        yield opened


@pytest.fixture
def bench(pool: Pool) -> Bench:
    return Bench(pool)


@pytest.fixture
async def lone_bench(database: Any) -> AsyncIterator[Bench]:
    """In a database of its own, for what looks at all organizations."""
    async with open_pool(database.role_url("quota"), application_name="test") as opened:
        yield Bench(opened)


async def test_each_mode_allows_warns_and_denies_at_its_lines(bench: Bench) -> None:
    # Used 5 of 10; the warning line is at 8.
    table = {
        "HARD": {"3": "ALLOW", "3.000001": "QUOTA_SOFT_LIMIT", "5": "QUOTA_SOFT_LIMIT", "5.000001": "DENY"},
        "SOFT": {"3": "ALLOW", "3.000001": "QUOTA_SOFT_LIMIT", "5": "QUOTA_SOFT_LIMIT", "5.000001": "QUOTA_EXCEEDED"},
        "DISABLED": {"3.000001": "ALLOW", "5.000001": "ALLOW"},
    }
    for mode, quantity, expected in [(mode, *cell) for mode, row in table.items() for cell in row.items()]:
        one = Bench(bench.pool)
        await one.limit("10", mode)
        await one.use("5")
        check = await one.quotas.check_quota(one.caller.org_id, "t", "e", Decimal(quantity))
        verdict = await one.use(quantity)
        assert said(verdict) == expected, (mode, quantity)
        assert check.allowed == verdict.admitted
        assert await one.current() == (5 if expected == "DENY" else 5 + Decimal(quantity))


async def test_the_lines_are_exact_for_the_largest_limits_with_six_decimals(bench: Bench) -> None:
    await bench.limit("99999999999999.999999", percent=99)
    line = Decimal("99999999999999.999999") * 99 / 100
    assert said(await bench.use(str(line.quantize(Decimal("0.000001"), rounding="ROUND_FLOOR")))) == "ALLOW"
    assert said(await bench.use("0.000001")) == "QUOTA_SOFT_LIMIT"


async def test_a_limit_of_zero_admits_nothing_under_hard(bench: Bench) -> None:
    await bench.limit("0")
    assert said(await bench.use("0.000001")) == "DENY"


async def test_a_refusal_says_which_limit_how_much_and_until_when(bench: Bench) -> None:
    await bench.limit("10")
    await bench.use("7.5")
    (violation,) = (await bench.use("3")).violations
    assert (violation.limit, violation.current, violation.requested) == (Decimal(10), Decimal("7.5"), Decimal(3))
    assert violation.reset_at == datetime(2026, 2, 1, tzinfo=UTC)


async def test_a_limit_set_in_mid_period_counts_what_was_used_before(bench: Bench) -> None:
    await bench.use("7")
    quota = await bench.limit("10")
    assert (quota.current, quota.remaining) == (Decimal(7), Decimal(3))
    assert said(await bench.use("3.5")) == "DENY"
    assert said(await bench.use("3")) == "QUOTA_SOFT_LIMIT"


async def test_lowering_a_limit_below_use_denies_and_deleting_it_frees_at_once(bench: Bench) -> None:
    await bench.limit("10")
    await bench.use("6")
    quota = await bench.limit("5")
    assert (quota.current, quota.remaining) == (Decimal(6), Decimal(0))
    assert said(await bench.use("0.1")) == "DENY"
    await bench.quotas.delete_quota(bench.caller, "t", "e")
    assert said(await bench.use("100")) == "ALLOW"
    with pytest.raises(NotFound):
        await bench.current()
    assert (await bench.limit("1")).current == 106


async def test_every_change_of_a_limit_is_logged_with_the_counter_and_a_repeat_is_none(bench: Bench) -> None:
    await bench.limit("10")
    bench.clock.moment += timedelta(minutes=1)
    repeated = await bench.limit("10.0")
    assert repeated.updated_at == NOW
    await bench.use("4")
    await bench.limit("20", "SOFT", "DAILY")
    await bench.quotas.delete_quota(bench.caller, "t", "e")
    with pytest.raises(NotFound):
        await bench.quotas.delete_quota(bench.caller, "t", "e")
    rows = await bench.pool.fetch(
        """
        SELECT version, limit_value, period, current, changed_by
        FROM quota.limit_change
        WHERE org_id = $1
        ORDER BY version
        """,
        bench.caller.org_id,
    )
    assert [tuple(row) for row in rows] == [
        (1, 10, "MONTHLY", 0, "key_test"),
        (2, 20, "DAILY", 4, "key_test"),
        (3, None, None, 4, "key_test"),
    ]


async def test_a_request_is_admitted_whole_or_not_at_all(bench: Bench) -> None:
    await bench.limit("10", tenant_id="a")
    await bench.limit("10", tenant_id="b")
    refused, admitted = await bench.reserve(
        [("a", "e", "1"), ("b", "e", "11"), ("c", "e", "1")], [("a", "e", "10"), ("b", "e", "1")]
    )
    assert [each.tenant_id for each in refused.violations] == ["b"]
    assert said(admitted) == "QUOTA_SOFT_LIMIT"
    assert await bench.counted() == [("a", 10), ("b", 1)]


async def test_earlier_requests_of_a_group_count_for_later_ones_and_refused_ones_do_not(bench: Bench) -> None:
    await bench.limit("10")
    verdicts = await bench.reserve(
        [("t", "e", "6")], [("t", "e", "5")], [("t", "e", "2"), ("t", "e", "2")], [("t", "e", "0.1")]
    )
    assert [said(each) for each in verdicts] == ["ALLOW", "DENY", "QUOTA_SOFT_LIMIT", "DENY"]
    assert [verdicts[number].violations[0].current for number in (1, 3)] == [6, 10]
    assert verdicts[2].warnings[0].requested == 4
    assert await bench.current() == 10


async def test_a_repeated_reserve_gets_the_first_verdicts_and_takes_nothing(bench: Bench) -> None:
    await bench.limit("10")
    reservation_id = ReservationId(uuid4())
    group = ([("t", "e", "9")], [("t", "e", "9")])
    first = await bench.reserve(*group, reservation_id=reservation_id)
    await bench.quotas.delete_quota(bench.caller, "t", "e")
    assert await bench.reserve(*group, reservation_id=reservation_id) == first
    assert [said(each) for each in first] == ["QUOTA_SOFT_LIMIT", "DENY"]
    assert await bench.counted() == [("t", 9)]
    with pytest.raises(FailedPrecondition) as caught:
        await bench.reserve(group[0], reservation_id=reservation_id)
    assert caught.value.condition == "RESERVATION_DIFFERS"


async def test_the_same_reserve_sent_many_times_at_once_takes_once(bench: Bench) -> None:
    reservation_id = ReservationId(uuid4())
    verdicts = await asyncio.gather(
        *[bench.reserve([("t", "e", "3")], reservation_id=reservation_id) for _ in range(8)]
    )
    assert all(each[0].admitted for each in verdicts)
    assert await bench.counted() == [("t", 3)]


async def test_aborting_gives_back_and_committing_does_not(bench: Bench) -> None:
    await bench.limit("10")
    aborted, committed = ReservationId(uuid4()), ReservationId(uuid4())
    await bench.reserve([("t", "e", "6")], [("t", "e", "6")], [("u", "e", "1")], reservation_id=aborted)
    assert said(await bench.use("5")) == "DENY"
    for _ in range(2):
        await bench.settle(aborted, Outcome.ABORTED)
        assert await bench.counted() == [("t", 0), ("u", 0)]
    await bench.reserve([("t", "e", "6")], reservation_id=committed)
    for _ in range(2):
        await bench.settle(committed, Outcome.COMMITTED)
        assert await bench.counted() == [("t", 6), ("u", 0)]


async def test_a_settled_reservation_cannot_be_settled_otherwise_or_reserved_again(bench: Bench) -> None:
    reservation_id, other = ReservationId(uuid4()), ReservationId(uuid4())
    await bench.reserve([("t", "e", "6")], reservation_id=reservation_id)
    await bench.reserve([("t", "e", "1")], reservation_id=other)
    await bench.settle(reservation_id, Outcome.COMMITTED)
    with pytest.raises(FailedPrecondition) as caught:
        await bench.admissions.settle({bench.caller.org_id: {reservation_id: Outcome.ABORTED, other: Outcome.ABORTED}})
    assert caught.value.condition == "RESERVATION_CONTRADICTED"
    assert await bench.counted() == [("t", 6)], "the other settlement of the call holds"
    with pytest.raises(FailedPrecondition) as caught:
        await bench.reserve([("t", "e", "6")], reservation_id=reservation_id)
    assert caught.value.condition == "RESERVATION_CLOSED"


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_a_reserve_later_than_its_settlement_meets_a_tombstone(bench: Bench, outcome: Outcome) -> None:
    reservation_id = ReservationId(uuid4())
    await bench.settle(reservation_id, outcome)
    with pytest.raises(FailedPrecondition) as caught:
        await bench.reserve([("t", "e", "1")], reservation_id=reservation_id)
    assert caught.value.condition == "RESERVATION_CLOSED"
    assert await bench.counted() == []


async def test_open_reservations_are_listed_by_age_and_only_closed_ones_are_pruned(lone_bench: Bench) -> None:
    ids = [ReservationId(uuid4()) for _ in range(3)]
    for reservation_id in ids:
        await lone_bench.reserve([("t", "e", "1")], reservation_id=reservation_id)
        lone_bench.clock.moment += timedelta(seconds=10)
    listed = await lone_bench.admissions.list_open_reservations(min_age=timedelta(seconds=20), limit=10)
    assert [each.reservation_id for each in listed] == ids[:2]
    await lone_bench.settle(ids[0], Outcome.COMMITTED)
    pruner = ReservationPruner(clock=lone_bench.clock, store=AdmissionStore(lone_bench.pool))
    lone_bench.clock.moment += KEPT_AFTER_CLOSING
    assert await pruner.prune() == 0
    lone_bench.clock.moment += timedelta(microseconds=1)
    assert await pruner.prune() == 1
    listed = await lone_bench.admissions.list_open_reservations(min_age=timedelta(0), limit=10)
    assert [each.reservation_id for each in listed] == ids[1:]


async def test_64_racing_tasks_get_exactly_what_a_hard_limit_of_1000_has(bench: Bench) -> None:
    """I4: no admission under HARD takes the counter above the limit."""
    await bench.limit("1000")
    admitted = 0

    async def drain() -> None:
        nonlocal admitted
        while (await bench.use("7")).admitted:
            admitted += 1

    await asyncio.gather(*[drain() for _ in range(64)])
    assert admitted == 1000 // 7
    assert await bench.current() == 7 * admitted


async def test_a_reserve_that_waited_for_a_change_of_the_limit_is_held_to_the_new_one(bench: Bench) -> None:
    """I4: a statement that locks and reads would overlook the limit that was set while it waited."""
    await bench.limit("10")
    async with bench.pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute(
                "SELECT quota.set_limit($1, 't', 'e', $2, 'key_test', 5, 'HARD', 'MONTHLY', 80::smallint, NULL)",
                bench.caller.org_id,
                NOW,
            )
            waiting = asyncio.create_task(bench.use("6"))
            while not await connection.fetchval("SELECT count(*) FROM pg_catalog.pg_locks WHERE NOT granted"):  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.005)
        assert said(await waiting) == "DENY"


async def test_locking_at_another_isolation_level_is_refused(bench: Bench) -> None:
    async with bench.pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
        with pytest.raises(asyncpg.RaiseError):
            await connection.execute("SELECT quota.lock_heads($1, '{t}', '{e}')", bench.caller.org_id)


async def test_however_many_event_types_a_group_has_it_takes_few_of_the_servers_locks(bench: Bench) -> None:
    """All sessions share one table of them: full, it fails whoever wants one next."""
    event_types = [f"e{number}" for number in range(2_000)]
    async with bench.pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "SELECT quota.lock_heads($1, $2, $3)", bench.caller.org_id, ["t"] * len(event_types), event_types
        )
        locks = await connection.fetchval("SELECT count(*) FROM pg_catalog.pg_locks WHERE pid = pg_backend_pid()")
    assert locks < 100


async def test_groups_with_the_same_keys_in_opposite_order_do_not_deadlock(bench: Bench) -> None:
    tenants = [f"tenant_{number:03d}" for number in range(60)]

    async def work(order: Sequence[str]) -> None:
        for _ in range(6):
            reservation_id = ReservationId(uuid4())
            await bench.reserve(*[[(tenant, "e", "1")] for tenant in order], reservation_id=reservation_id)
            await bench.settle(reservation_id, Outcome.ABORTED)

    before = await bench.pool.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    await asyncio.gather(*[work(tenants if number % 2 else tenants[::-1]) for number in range(8)])
    assert {quantity for _, quantity in await bench.counted()} == {0}
    await bench.pool.fetchval("SELECT pg_stat_clear_snapshot()")
    assert before == await bench.pool.fetchval(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )


async def test_settling_races_with_its_reserve_and_counts_nothing_twice(bench: Bench) -> None:
    for _ in range(20):
        reservation_id = ReservationId(uuid4())
        await asyncio.gather(
            bench.reserve([("t", "e", "5")], reservation_id=reservation_id),
            bench.settle(reservation_id, Outcome.ABORTED),
            return_exceptions=True,
        )
        await bench.settle(reservation_id, Outcome.ABORTED)
    assert {quantity for _, quantity in await bench.counted()} <= {0}


@pytest.mark.parametrize(
    ("period", "last", "reset_at"),
    [
        ("HOURLY", datetime(2026, 1, 15, 10, 59, 59, 999_999, tzinfo=UTC), datetime(2026, 1, 15, 11, tzinfo=UTC)),
        ("DAILY", datetime(2026, 1, 15, 23, 59, 59, 999_999, tzinfo=UTC), datetime(2026, 1, 16, tzinfo=UTC)),
        ("MONTHLY", datetime(2026, 1, 31, 23, 59, 59, 999_999, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)),
    ],
)
async def test_a_calendar_period_resets_at_its_end_and_not_before(
    bench: Bench, period: str, last: datetime, reset_at: datetime
) -> None:
    quota = await bench.limit("10", period=period)
    assert quota.reset_at == reset_at
    await bench.use("10")
    bench.clock.moment = last
    refused = await bench.use("1")
    assert refused.violations[0].reset_at == reset_at
    bench.clock.moment = reset_at
    assert await bench.current() == 0
    assert said(await bench.use("1")) == "ALLOW"
    late = await bench.use("1", at=last)
    assert late.violations[0].reset_at is None, "a period that is over never resets for what happened in it"
    assert await bench.current() == 1


@pytest.mark.parametrize("changed", [Bench.limit, Bench.default])
async def test_a_rolling_limit_set_after_a_midnight_binds_who_asked_before_it_and_waited(
    bench: Bench, changed: Callable[..., Awaitable[object]]
) -> None:
    """I4: neither the old limit nor the new one would bind them, since today's window ended before the change."""
    midnight = NOW.replace(hour=0, minute=0) + timedelta(days=1)
    await changed(bench, "10", period="ROLLING_30D")
    bench.clock.moment = midnight + timedelta(seconds=1)
    await changed(bench, "5", period="ROLLING_30D")
    bench.clock.moment = midnight - timedelta(seconds=1)
    assert said(await bench.use("5.000001")) == "DENY"
    assert said(await bench.use("5")) == "QUOTA_SOFT_LIMIT"


async def test_the_rolling_window_drops_a_day_at_midnight_after_30(bench: Bench) -> None:
    quota = await bench.limit("10", period="ROLLING_30D")
    assert quota.reset_at == datetime(2026, 1, 16, tzinfo=UTC)
    await bench.use("6")
    bench.clock.moment = NOW + timedelta(days=1)
    await bench.use("4")
    bench.clock.moment = datetime(2026, 2, 13, 23, 59, 59, tzinfo=UTC)
    refused = await bench.use("1")
    assert refused.violations[0].reset_at == datetime(2026, 2, 14, tzinfo=UTC)
    bench.clock.moment = datetime(2026, 2, 14, tzinfo=UTC)
    assert await bench.current() == 4
    assert said(await bench.use("6.5")) == "DENY"
    assert said(await bench.use("50", at=NOW)) == "ALLOW", "older than the window: only counted"
    assert said(await bench.use("6.5", at=NOW + timedelta(days=1))) == "DENY"
    assert said(await bench.use("6", at=datetime(2026, 2, 15, tzinfo=UTC))) == "QUOTA_SOFT_LIMIT", "tomorrow counts"
    assert await bench.current() == 10


async def test_a_limit_binds_the_periods_that_end_after_it_was_set(bench: Bench) -> None:
    bench.clock.moment = datetime(2026, 2, 1, tzinfo=UTC)
    january = bench.clock.moment - timedelta(microseconds=1)
    await bench.limit("10")
    assert said(await bench.use("11", at=january)) == "ALLOW", "January ended when the limit was set"
    await bench.quotas.delete_quota(bench.caller, "t", "e")
    bench.clock.moment = january
    await bench.limit("20")
    bench.clock.moment = datetime(2026, 2, 1, tzinfo=UTC)
    assert said(await bench.use("10", at=january)) == "DENY"
    assert said(await bench.use("9", at=january)) == "QUOTA_SOFT_LIMIT"


async def test_a_request_over_two_periods_is_measured_in_each(bench: Bench) -> None:
    await bench.limit("10", period="HOURLY")
    eleven = NOW + timedelta(hours=1)
    hours = [hour_start(NOW), hour_start(eleven)]
    await bench.use("5", at=eleven)

    async def request(first: str, second: str) -> Verdict:
        items = [UsageItem("t", "e", hour, Decimal(q)) for hour, q in zip(hours, (first, second), strict=True)]
        (verdict,) = await bench.admissions.reserve(bench.caller.org_id, ReservationId(uuid4()), [items])
        return verdict

    refused = await request("10.5", "5.5")
    assert [each.current for each in refused.violations] == [0, 5]
    assert [each.reset_at for each in refused.violations] == [hours[1], hours[1] + timedelta(hours=1)]
    assert [each.kind for each in (await request("10", "5")).warnings] == [FindingKind.QUOTA_SOFT_LIMIT] * 2


async def test_adjusting_is_signed_idempotent_and_never_goes_below_zero(bench: Bench) -> None:
    await bench.limit("10")
    await bench.use("9")

    def adjustment(quantity: str) -> Adjustment:
        return Adjustment(uuid4(), "t", "e", hour_start(NOW), Decimal(quantity))

    back, much, up = adjustment("-5"), adjustment("-4.5"), adjustment("20")
    for _ in range(2):
        await bench.admissions.adjust({bench.caller.org_id: [back]})
        assert await bench.current() == 4
    with pytest.raises(Internal):
        await bench.admissions.adjust({bench.caller.org_id: [much, up]})
    assert await bench.current() == 24, "the others of the call are counted, whatever the limit"
    await bench.admissions.adjust({bench.caller.org_id: [much]})
    assert await bench.counted() == [("t", Decimal("19.5"))]


async def test_a_settlement_that_cannot_be_leaves_no_other_of_its_call_undone(bench: Bench) -> None:
    others = [Bench(bench.pool), Bench(bench.pool)]
    contradicted, damaged, sound = (ReservationId(uuid4()) for _ in range(3))
    await others[0].reserve([("t", "e", "1")], reservation_id=contradicted)
    await others[0].settle(contradicted, Outcome.COMMITTED)
    await bench.reserve([("t", "e", "5")], reservation_id=damaged)
    await bench.reserve([("u", "e", "2")], reservation_id=sound)
    await others[1].reserve([("t", "e", "3")], reservation_id=sound)
    for table in ("usage_hour", "usage_day"):
        await bench.pool.execute(
            f"UPDATE quota.{table} SET quantity = 1 WHERE org_id = $1 AND tenant_id = 't'", bench.caller.org_id
        )
    aborted = Outcome.ABORTED
    with pytest.raises(Internal):
        await bench.admissions.settle(
            {
                others[0].caller.org_id: {contradicted: aborted},
                bench.caller.org_id: {damaged: aborted, sound: aborted},
                others[1].caller.org_id: {sound: aborted},
            }
        )
    assert await bench.counted() == [("t", 1), ("u", 0)]
    assert await others[0].counted() == [("t", 1)]
    assert await others[1].counted() == [("t", 0)]
    states = await bench.pool.fetch(
        "SELECT reservation_id, state FROM quota.reservation WHERE org_id = $1", bench.caller.org_id
    )
    assert {row["reservation_id"]: row["state"] for row in states} == {damaged: "OPEN", sound: "ABORTED"}


async def test_an_adjustment_below_zero_leaves_no_other_organizations_undone(bench: Bench) -> None:
    others = [Bench(bench.pool), Bench(bench.pool)]
    for one in (bench, *others):
        await one.use("5")
    hour = hour_start(NOW)
    with pytest.raises(Internal):
        await bench.admissions.adjust(
            {
                one.caller.org_id: [Adjustment(uuid4(), "t", "e", hour, Decimal(quantity))]
                for one, quantity in zip((others[0], bench, others[1]), ("-1", "-6", "-2"), strict=True)
            }
        )
    assert [await one.counted() for one in (others[0], bench, others[1])] == [[("t", 4)], [("t", 5)], [("t", 3)]]


async def test_organizations_do_not_see_each_other(bench: Bench) -> None:
    other = Bench(bench.pool, bench.clock)
    await bench.limit("1")
    assert said(await other.use("5")) == "ALLOW"
    assert await bench.current() == 0
    assert await other.quotas.list_quotas(other.caller.org_id, tenant_id=None, after=("", ""), limit=10) == []


async def test_periods_in_sql_are_utc_hours_days_and_months_in_any_time_zone(bench: Bench) -> None:
    leap_day, march = datetime(2024, 2, 29, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)
    january = datetime(2026, 1, 1, tzinfo=UTC)
    hour, day = timedelta(hours=1), timedelta(days=1)
    expected = [
        ("HOURLY", march - timedelta(microseconds=1), march - hour, march),
        ("HOURLY", march, march, march + hour),
        ("DAILY", march - timedelta(microseconds=1), leap_day, march),
        ("DAILY", march, march, march + day),
        ("MONTHLY", march - timedelta(microseconds=1), datetime(2024, 2, 1, tzinfo=UTC), march),
        ("MONTHLY", march, march, datetime(2024, 4, 1, tzinfo=UTC)),
        ("MONTHLY", datetime(2025, 12, 31, 23, 30, tzinfo=UTC), datetime(2025, 12, 1, tzinfo=UTC), january),
        ("MONTHLY", NOW, january, datetime(2026, 2, 1, tzinfo=UTC)),
    ]
    async with bench.pool.acquire() as connection:
        await connection.execute("SET timezone = 'Pacific/Kiritimati'")
        for period, moment, start, end in expected:
            row = await connection.fetchrow("SELECT * FROM quota.period_of($1, $2, $3)", period, moment, NOW)
            assert row is not None
            assert (row["counted_from"], row["counted_until"], row["ends_at"]) == (start, end, end)


async def test_the_role_cannot_rewrite_what_is_append_only(bench: Bench) -> None:
    for table in ("limit_change", "adjustment", "quota_event"):
        for statement in (f"DELETE FROM quota.{table}", f"UPDATE quota.{table} SET org_id = org_id"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await bench.pool.execute(statement)
