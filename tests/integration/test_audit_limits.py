"""The audit of limits (invariant I4): a HARD limit that was exceeded is named, and nothing else is."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from tests.conftest import Database
from tests.support.auditing import audit_ingest, audit_limits, place_of
from tests.support.clock import ManualClock
from tests.support.quota import NOW, Bench, said
from tests.support.services import open_services
from tests.support.sql import execute, fetch_value
from usameter.ingest.v1 import event_pb2, reconciliation_pb2, reconciliation_pb2_grpc
from usameter.quota.v1 import quota_pb2
from usameter_core.audit import Violation
from usameter_core.postgres.migrate import migrate
from usameter_core.postgres.pool import Pool, open_pool
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_quota.domain.admission import Adjustment
from usameter_quota.domain.limits import EVERY_TENANT
from usameter_quota.domain.reconciliation import CounterKey, CounterUnit, Difference
from usameter_quota.service.auditing import LimitAuditingService
from usameter_quota.store.auditing import AuditStore
from usameter_quota.store.reconciliation import ReconciliationStore

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
# How the period that holds NOW is named.
PLACES = {
    "HOURLY": ("an hour", {"hour": "2026-01-15T10:00:00Z"}),
    "DAILY": ("a day", {"day": "2026-01-15"}),
    "MONTHLY": ("a month", {"period_start": "2026-01-01"}),
    "ROLLING_30D": ("30 days", {"period_start": "2025-12-17"}),
}


@pytest.fixture(scope="module")
async def pool(postgres: EmbeddedPostgres) -> AsyncIterator[Pool]:
    """One database for all tests here: each has an organization of its own."""
    await postgres.ensure_database("audit_limits")
    await migrate(postgres.url("audit_limits"), schema="quota", package="usameter_quota")
    async with open_pool(postgres.url("audit_limits", user="usameter_quota"), application_name="test") as opened:
        yield opened


@pytest.fixture
def bench(pool: Pool) -> Bench:
    return Bench(pool)


async def audit(bench: Bench) -> list[Violation]:
    """What the audit finds, in pages as small as they can be as in large ones."""
    org_id, store = bench.caller.org_id, AuditStore(bench.pool)
    found = await audit_limits(LimitAuditingService(clock=bench.clock, store=store), org_id)
    for sizes in ({"heads_max": 1, "changes_max": 1}, {"periods_max": 1, "changes_max": 2}):
        assert await audit_limits(LimitAuditingService(clock=bench.clock, store=store, **sizes), org_id) == found
    return found[1]


async def exceed(bench: Bench, quantity: str, *, at: datetime | None = None, tenant_id: str = "t") -> None:
    """Admit what no limit admits."""
    hour = (at or bench.clock.now()).replace(minute=0)
    await bench.pool.execute(
        "SELECT quota.add_use($1, $2, 'e', $3, $4)", bench.caller.org_id, tenant_id, hour, Decimal(quantity)
    )


def violation(period: str, most: str, limit: str, found: str, *, changed: bool = False, **place: str) -> Violation:
    name, at = PLACES[period]
    problem = f"the counter of {name} went above its HARD limit{' before that was changed' if changed else ''}"
    expected = f"at most {most}, of a limit of {limit}"
    return Violation("I4", problem, expected, found, {"tenant_id": "t", "event_type": "e", **at, **place})


@pytest.mark.parametrize("period", PLACES)
async def test_a_counter_above_the_limit_in_force_is_named(bench: Bench, period: str) -> None:
    await bench.limit("10", period=period)
    await bench.store("9.5")
    await exceed(bench, "0.5")
    assert await audit(bench) == []
    await exceed(bench, "0.000001")
    with capture_logs() as logs:
        assert await audit(bench) == [violation(period, "10", "10", "10.000001")]
    assert [(each["log_level"], each["tenant_id"], each["event_type"], each["found"]) for each in logs] == [
        ("error", "t", "e", "10.000001")
    ] * 3


@pytest.mark.parametrize("period", PLACES)
async def test_a_counter_may_stay_where_it_was_when_the_limit_was_lowered_below_it(bench: Bench, period: str) -> None:
    await bench.store("5")
    await bench.limit("3", period=period)
    assert await audit(bench) == []
    await exceed(bench, "0.1")
    assert await audit(bench) == [violation(period, "5", "3", "5.1")]


@pytest.mark.parametrize("period", PLACES)
async def test_what_exceeded_a_limit_is_named_also_once_that_was_raised_or_deleted(bench: Bench, period: str) -> None:
    """The next change recorded the counter, for ever."""
    await bench.limit("10", period=period)
    await exceed(bench, "11")
    await bench.limit("100", period=period)
    assert await audit(bench) == [violation(period, "10", "10", "11", changed=True)]
    await exceed(bench, "100")
    await bench.quotas.delete_quota(bench.caller, "t", "e")
    found = [
        violation(period, "10", "10", "11", changed=True),
        violation(period, "100", "100", "111", changed=True),
    ]
    assert await audit(bench) == found
    # What was given back since then was admitted all the same.
    await exceed(bench, "-111")
    assert await audit(bench) == found


async def test_every_period_since_the_limit_was_set_is_looked_at(bench: Bench) -> None:
    await bench.limit("10", period="HOURLY")
    for hours in (2, 24, 24 * 40):
        await exceed(bench, "10.5", at=NOW + hours * HOUR)
    bench.clock.moment += 50 * DAY
    assert await audit(bench) == [
        violation("HOURLY", "10", "10", "10.5", hour=hour)
        for hour in ("2026-01-15T12:00:00Z", "2026-01-16T10:00:00Z", "2026-02-24T10:00:00Z")
    ]


async def test_a_default_is_audited_in_periods_that_began_after_it_was_set(bench: Bench) -> None:
    """Nobody recorded what each tenant had used when it was set."""
    await bench.store("50")
    await bench.default("10", period="DAILY")
    await bench.default("20", period="DAILY")
    assert await audit(bench) == []
    bench.clock.moment += DAY
    await bench.store("20")
    await bench.store("19", tenant_id="u")
    assert await audit(bench) == []
    await exceed(bench, "0.5")
    await exceed(bench, "11", tenant_id="u")
    assert await audit(bench) == [
        violation("DAILY", "20", "20", "20.5", day="2026-01-16"),
        violation("DAILY", "20", "20", "30", day="2026-01-16", tenant_id="u"),
    ]


async def test_a_rolling_default_is_audited_once_all_of_its_window_is_long_after_it_was_set(bench: Bench) -> None:
    """A hold from before may have moved into days that came after."""
    await bench.default("10", period="ROLLING_30D")
    bench.clock.moment += 59 * DAY
    await bench.store("10")
    await exceed(bench, "1")
    assert await audit(bench) == []
    bench.clock.moment += DAY
    assert await audit(bench) == [violation("ROLLING_30D", "10", "10", "11", period_start="2026-02-15")]


@pytest.mark.parametrize("period", PLACES)
async def test_a_default_binds_from_when_the_limit_of_a_tenants_own_was_deleted(bench: Bench, period: str) -> None:
    await bench.default("10", period=period)
    bench.clock.moment += timedelta(hours=1, minutes=5)
    hour = {"hour": "2026-01-15T11:00:00Z"} if period == "HOURLY" else {}
    await bench.limit("100", period=period)
    await bench.store("50")
    await bench.quotas.delete_quota(bench.caller, "t", "e")
    assert said(await bench.store("1")) == "DENY"
    assert await audit(bench) == []
    await exceed(bench, "1")
    assert await audit(bench) == [violation(period, "50", "10", "51", **hour)]


async def test_a_deletion_of_another_kind_of_period_says_nothing_of_a_default(bench: Bench) -> None:
    await bench.default("10")
    await bench.store("8")
    bench.clock.moment += 2 * HOUR
    await bench.limit("100", period="HOURLY")
    await bench.store("50")
    await bench.quotas.delete_quota(bench.caller, "t", "e")
    assert await audit(bench) == []


async def test_what_no_limit_bound_is_not_named(bench: Bench) -> None:
    await bench.store("50", at=NOW - 2 * DAY)
    # Dated ahead: of a period that began after the limit, and used before it.
    await bench.store("50", at=NOW + HOUR)
    await bench.limit("10", period="HOURLY")
    assert said(await bench.store("50", at=NOW - HOUR)) == "ALLOW"
    assert await audit(bench) == []
    for mode in ("SOFT", "DISABLED"):
        await bench.limit("10", mode, "DAILY")
        await bench.store("50")
        assert await audit(bench) == []
    bench.clock.moment += 2 * DAY
    await bench.store("50")
    await bench.limit("10", period="DAILY")
    assert await audit(bench) == []


async def test_a_hold_from_before_a_limit_was_lowered_is_consumed_without_a_violation(bench: Bench) -> None:
    await bench.limit("10", period="DAILY")
    await bench.hold("8", ttl=timedelta(hours=5))
    await bench.limit("3", period="DAILY")
    bench.clock.moment += 2 * HOUR
    assert said(await bench.claim("8")) != "DENY"
    assert said(await bench.store("1")) == "DENY"
    await bench.limit("2", period="DAILY")
    assert await audit(bench) == []


async def test_days_that_leave_the_window_make_room_and_no_violation(bench: Bench) -> None:
    await bench.store("50", at=NOW - 29 * DAY)
    await bench.store("5")
    await bench.limit("10", period="ROLLING_30D")
    bench.clock.moment += DAY
    await bench.store("5")
    # Only counted, since before the window of today.
    await bench.store("70", at=NOW - 29 * DAY)
    await bench.limit("11", period="ROLLING_30D")
    assert await audit(bench) == []


async def test_a_change_in_the_last_hour_of_a_day_is_not_held_against_a_rolling_window(bench: Bench) -> None:
    """A request that was decided after midnight did not count the oldest day, which the change, asked before, does."""
    bench.clock.moment = NOW.replace(hour=23)
    await bench.limit("10", period="ROLLING_30D")
    await exceed(bench, "50", at=NOW - 29 * DAY)
    await bench.limit("20", period="ROLLING_30D")
    assert await audit(bench) == []


async def test_an_adjustment_upwards_is_no_admission(bench: Bench) -> None:
    await bench.limit("10")
    await bench.store("10")
    adjustment = Adjustment(uuid4(), "t", "e", NOW.replace(minute=0), Decimal("2.5"))
    await bench.admissions.adjust({bench.caller.org_id: [adjustment]})
    assert await audit(bench) == []
    await exceed(bench, "0.5")
    assert await audit(bench) == [violation("MONTHLY", "12.5", "10", "13")]


async def repair(bench: Bench, period: str, counter: str, expected: str) -> None:
    unit, start = (CounterUnit.HOUR, NOW.replace(minute=0)) if period == "HOURLY" else (CounterUnit.DAY, None)
    key = CounterKey("t", "e", unit, start or NOW.replace(hour=0, minute=0))
    store = ReconciliationStore(bench.pool)
    async with store.locked(bench.caller.org_id, [key]) as counters:
        difference = Difference(key, Decimal(counter), Decimal(expected), Decimal(0), Decimal(expected))
        await counters.repair([difference], now=bench.clock.now(), repaired_by="key_test")


@pytest.mark.parametrize("period", PLACES)
async def test_a_repair_that_takes_a_counter_above_its_limit_is_no_admission(bench: Bench, period: str) -> None:
    """It says what had been lost of the counter, while the limit let others in."""
    await bench.store("5")
    await exceed(bench, "-5")
    await bench.limit("6", period=period)
    await bench.store("6")
    await repair(bench, period, "6", "11")
    assert await audit(bench) == []
    bench.clock.moment += 20 * timedelta(minutes=1)
    await bench.limit("7", period=period)
    assert await audit(bench) == []
    await exceed(bench, "5.5")
    assert await audit(bench) == [violation(period, "16", "7", "16.5")]


@pytest.mark.parametrize("period", PLACES)
async def test_what_was_recorded_of_a_counter_that_was_too_high_is_no_alarm_once_it_is_repaired(
    bench: Bench, period: str
) -> None:
    await bench.limit("6", period=period)
    await bench.store("6")
    await exceed(bench, "4")
    await bench.limit("7", period=period)
    assert await audit(bench) == [violation(period, "6", "6", "10", changed=True)]
    await repair(bench, period, "10", "6")
    assert await audit(bench) == []


async def test_a_repair_of_another_period_or_head_excuses_nothing(bench: Bench) -> None:
    await bench.limit("6", period="HOURLY")
    await exceed(bench, "7")
    await repair(bench, "DAILY", "7", "8")
    await bench.pool.execute(
        """
        INSERT INTO quota.repair
        SELECT org_id, gen_random_uuid(), repaired_at, repaired_by, other.tenant_id, event_type, 'HOUR', other.hour,
            0, 9, 0, 9
        FROM quota.repair
        CROSS JOIN (VALUES ('u', $2::timestamptz), ('t', $3::timestamptz)) AS other (tenant_id, hour)
        WHERE org_id = $1
        """,
        bench.caller.org_id,
        NOW.replace(minute=0),
        NOW.replace(minute=0) + HOUR,
    )
    assert await audit(bench) == [violation("HOURLY", "6", "6", "7")]


async def test_nothing_is_named_while_limits_change_and_are_used_up(bench: Bench) -> None:
    """Counters and limits are read at one moment, whatever commits meanwhile."""
    verdicts: list[str] = []
    looked = 0

    async def use() -> None:
        while looked < 100:
            verdicts.append(said(await bench.store("1")))

    async def change() -> None:
        for value in itertools.cycle(["5", "3", "40", "20", "60"]):
            if looked >= 100:
                break
            await bench.limit(value, period="DAILY")
            if value == "60":
                await bench.quotas.delete_quota(bench.caller, "t", "e")
                bench.clock.moment += DAY

    async with asyncio.TaskGroup() as tasks:
        for work in (use, use, use, change):
            tasks.create_task(work())
        while looked < 100 or not {"ALLOW", "DENY"} <= set(verdicts):
            auditing = LimitAuditingService(clock=bench.clock, store=AuditStore(bench.pool))
            assert (await audit_limits(auditing, bench.caller.org_id))[1] == []
            looked += 1


async def test_the_organization_of_others_is_not_looked_at(bench: Bench) -> None:
    await bench.limit("6")
    await exceed(bench, "7")
    assert await audit(Bench(bench.pool)) == []


async def test_the_head_of_a_default_is_no_tenants(bench: Bench) -> None:
    await bench.default("6")
    await exceed(bench, "7", tenant_id=EVERY_TENANT)
    await bench.default("5")
    assert await audit(bench) == []


async def test_the_audit_of_counters_goes_on_with_that_of_limits(database: Database) -> None:
    """Over gRPC, as `usameter audit` asks for it; a repair ends what the first half says, and excuses the second."""
    clock = ManualClock(datetime(2026, 3, 10, 12, 30, tzinfo=UTC))

    def clean() -> float:
        return REGISTRY.get_sample_value("usameter_last_clean_audit_timestamp_seconds", {"audited": "quotas"}) or 0

    def violations() -> float:
        return REGISTRY.get_sample_value("usameter_invariant_violations_total", {"invariant": "I4"}) or 0

    async with open_services(database, clock=clock) as services:
        limit: Any = {"limit_value": "6", "enforcement_mode": quota_pb2.HARD, "period": quota_pb2.DAILY}
        limit |= {"tenant_id": "acme", "event_type": "req"}
        await services.quotas.SetQuota(quota_pb2.SetQuotaRequest(**limit), metadata=services.metadata, timeout=10)
        event: Any = {"tenant_id": "acme", "event_type": "req", "quantity": 6}
        event["timestamp"] = clock.now()
        await services.events.RecordEvents(
            event_pb2.RecordEventsRequest(**event), metadata=services.metadata, timeout=10
        )
        audited, counted = clean(), violations()
        assert await audit_ingest(services.ingest, services.metadata) == []
        assert clean() > audited
        assert violations() == counted

        audited = clean()
        await execute(database, "UPDATE quota.usage_day SET quantity = 7")
        counters, limits = await audit_ingest(services.ingest, services.metadata)
        assert (counters.expected, counters.found) == ("6", "7")
        assert (limits.invariant, limits.expected, limits.found) == ("I4", "at most 6, of a limit of 6", "7")
        assert place_of(limits) == {"tenant_id": "acme", "event_type": "req", "day": "2026-03-10"}
        assert violations() == counted + 2
        assert clean() == audited

        # The next change records what is wrong.
        limit["limit_value"] = "8"
        await services.quotas.SetQuota(quota_pb2.SetQuotaRequest(**limit), metadata=services.metadata, timeout=10)
        _, limits = await audit_ingest(services.ingest, services.metadata)
        assert limits.problem == "the counter of a day went above its HARD limit before that was changed"
        reconciliation: Any = reconciliation_pb2_grpc.ReconciliationServiceStub(services.ingest)
        token = ""
        while True:
            request = reconciliation_pb2.ReconcileQuotasRequest(fix=True, page_token=token)
            page = await reconciliation.ReconcileQuotas(request, metadata=services.metadata, timeout=30)
            token = page.next_page_token
            if not token:
                break
        assert await fetch_value(database, "SELECT quantity FROM quota.usage_day") == 6
        assert await audit_ingest(services.ingest, services.metadata) == []
