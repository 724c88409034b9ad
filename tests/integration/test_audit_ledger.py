"""The audit of the ledger: whatever is changed behind the services' backs it names, and nothing else (I1 to I4, I9)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc.aio
import pytest
from prometheus_client import REGISTRY

from tests.conftest import Database
from tests.support.audit import is_settled
from tests.support.auditing import audit_ingest, place_of
from tests.support.clock import ManualClock
from tests.support.services import Services, new_organization, open_services, reason_of
from tests.support.sql import fetch_value
from tests.support.wait import until
from usameter.common.v1 import audit_pb2
from usameter.ingest.v1 import audit_pb2 as ingest_audit_pb2
from usameter.ingest.v1 import audit_pb2_grpc, event_pb2, snapshot_pb2
from usameter_core.ids import OrgId
from usameter_core.postgres.pool import open_pool
from usameter_ingest.domain.auditing import AuditPlace
from usameter_ingest.service.auditing import AuditingService
from usameter_ingest.store.auditing import AuditStore
from usameter_proof.ledger_format import event_id_of_key

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock(NOW)) as running:
        yield running


def event(key: str, *, at: datetime = NOW, tenant: str = "acme") -> dict[str, Any]:
    return {
        "event_type": "req",
        "tenant_id": tenant,
        "quantity_decimal": "2",
        "idempotency_key": key,
        "timestamp": at,
        "metadata": {"region": "eu"},
    }


async def record(services: Services, *events: dict[str, Any]) -> list[str]:
    request = event_pb2.RecordEventsRequest(events=list(events))
    answer = await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)
    return [result.event_id for result in answer.results]


async def correct(services: Services, event_id: str, quantity: str | None) -> None:
    """Amend, or void where no quantity is given."""
    if quantity is None:
        request = event_pb2.VoidEventRequest(event_id=event_id, reason="twice")
        await services.events.VoidEvent(request, metadata=services.metadata, timeout=10)
    else:
        amendment = event_pb2.AmendEventRequest(event_id=event_id, quantity_decimal=quantity, reason="less")
        await services.events.AmendEvent(amendment, metadata=services.metadata, timeout=10)


async def seal(services: Services) -> None:
    request = snapshot_pb2.SealEpochsRequest()
    await services.snapshots.SealEpochs(request, metadata=services.cron_metadata, timeout=20)


async def audit(services: Services) -> list[audit_pb2.Violation]:
    """What the audits of the ledger and of its counters find."""
    return await audit_ingest(services.ingest, services.metadata)


async def new_ledger(services: Services) -> None:
    """Three epochs, the last open: "a", "b", "c" | "d" of the day before, "b" voided, "c" amended | "e"."""
    ids = await record(services, event("a"), event("b"), event("c", tenant="bolt"))
    await seal(services)
    await record(services, event("d", at=NOW - timedelta(days=1)))
    await correct(services, ids[1], None)
    await correct(services, ids[2], "1.5")
    await seal(services)
    await record(services, event("e"))


async def settled(services: Services, database: Database) -> None:
    async def nothing_waits() -> bool:
        waiting = await fetch_value(database, "SELECT count(*) FROM ingest.quota_outbox")
        return waiting == 0 and await is_settled(database.admin_url)

    await until(nothing_waits, "reservations and given back quantities are settled")


async def tamper(database: Database, *statements: str) -> None:
    """As superuser, foreign keys or not."""
    connection = await asyncpg.connect(database.admin_url)
    await connection.execute("SET session_replication_role = replica")
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


async def test_a_sound_ledger_has_no_violation_and_metrics_say_when(services: Services, database: Database) -> None:
    await new_ledger(services)
    await settled(services, database)
    assert await audit(services) == []
    for audited in ("ledger", "quotas"):
        noted = REGISTRY.get_sample_value("usameter_last_clean_audit_timestamp_seconds", {"audited": audited})
        assert noted is not None and abs(noted - datetime.now(UTC).timestamp()) < 60


async def test_an_organization_without_a_ledger_has_no_violation(services: Services) -> None:
    assert await audit(services) == []


DAY = {"tenant_id": "acme", "event_type": "req", "day": "2026-03-10"}
HOUR = {"tenant_id": "acme", "event_type": "req", "hour": "2026-03-10T12:00:00Z"}
OF_A = "WHERE idempotency_key = 'a'"
ID_LEAF = "an event's leaf is not that of what is stored"
OF_HASH = "an event's request hash is not that of what is stored"
OF_DAY = "the rollup of a day is not the sum of its entries"
OF_HOUR = "the rollup of an hour is not the sum of its entries"
OF_ROOT = "a snapshot's root does not follow from its entries"
OF_SUM = "a snapshot is not the sum of its rollups"
OF_LEAF = "a snapshot's leaf is not that of what it holds"
OF_CORRECTION = "a correction's leaf is not that of what is stored"


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        pytest.param(
            [f"""UPDATE ingest.usage_event SET metadata = '{{"region":"us"}}' {OF_A}"""],
            [("I1", OF_HASH, {"event": "a", "epoch": 1})],
            id="a byte of metadata",
        ),
        pytest.param(
            [f"UPDATE ingest.usage_event SET quantity = 2.000001 {OF_A}"],
            [
                ("I1", OF_HASH, {"event": "a", "epoch": 1}),
                ("I2", OF_DAY, {**DAY, "epoch": 1}),
                ("I2", OF_HOUR, HOUR),
            ],
            id="a quantity",
        ),
        pytest.param(
            [f"UPDATE ingest.usage_event SET occurred_at = occurred_at + interval '1 microsecond' {OF_A}"],
            [("I1", ID_LEAF, {"event": "a", "epoch": 1})],
            id="a time",
        ),
        pytest.param(
            [f"UPDATE ingest.usage_event SET ingested_at = ingested_at - interval '1 day' {OF_A}"],
            [("I1", ID_LEAF, {"event": "a", "epoch": 1})],
            id="when it was ingested",
        ),
        pytest.param(
            ["UPDATE ingest.usage_event SET idempotency_key = 'z' WHERE idempotency_key = 'a'"],
            [
                ("I1", "an event's id is not that of its key", {"event": "a", "epoch": 1}),
                ("I1", ID_LEAF, {"event": "a", "epoch": 1}),
            ],
            id="a key",
        ),
        pytest.param(
            [f"UPDATE ingest.usage_event SET leaf_hash = sha256('x') {OF_A}"],
            [
                ("I1", ID_LEAF, {"event": "a", "epoch": 1}),
                ("I3", OF_ROOT, {**DAY, "epoch": 1, "snapshot_id": ...}),
            ],
            id="a leaf",
        ),
        pytest.param(
            [f"DELETE FROM ingest.usage_event {OF_A}"],
            [
                ("I2", OF_DAY, {**DAY, "epoch": 1}),
                ("I2", OF_HOUR, HOUR),
                ("I3", OF_ROOT, {**DAY, "epoch": 1, "snapshot_id": ...}),
            ],
            id="a removed event",
        ),
        pytest.param(
            ["UPDATE ingest.correction SET reason = 'once' WHERE kind = 'VOID'"],
            [("I1", OF_CORRECTION, {"event": "b", "epoch": 2})],
            id="a reason",
        ),
        pytest.param(
            ["UPDATE ingest.correction SET kind = 'VOID' WHERE kind = 'AMEND'"],
            [
                ("I1", OF_CORRECTION, {"event": "c", "epoch": 2}),
                ("I1", "a correction leaves another quantity than its kind does", {"event": "c", "epoch": 2}),
            ],
            id="a correction's kind",
        ),
        pytest.param(
            ["DELETE FROM ingest.correction WHERE kind = 'VOID'"],
            [
                ("I2", OF_DAY, {**DAY, "epoch": 2}),
                ("I2", OF_HOUR, HOUR),
            ],
            id="a removed correction",
        ),
        pytest.param(
            ["UPDATE ingest.usage_hour SET event_count = event_count + 1 WHERE tenant_id = 'bolt'"],
            [("I2", OF_HOUR, {**HOUR, "tenant_id": "bolt"})],
            id="a rollup's count",
        ),
        pytest.param(
            ["UPDATE ingest.usage_day SET quantity = quantity + 1 WHERE epoch = 3"],
            [("I2", OF_DAY, {**DAY, "epoch": 3}), ("I4", "the counter of a day …", {**DAY})],
            id="an open epoch's rollup",
        ),
        pytest.param(
            ["DELETE FROM ingest.usage_day WHERE epoch = 3"],
            [("I2", OF_DAY, {**DAY, "epoch": 3}), ("I4", "the counter of a day …", {**DAY})],
            id="an event without its rollup",
        ),
        pytest.param(
            ["UPDATE ingest.snapshot SET quantity = 5 WHERE epoch = 1 AND tenant_id = 'acme'"],
            [
                ("I3", OF_LEAF, {**DAY, "epoch": 1, "snapshot_id": ...}),
                ("I3", OF_SUM, {**DAY, "epoch": 1, "snapshot_id": ...}),
            ],
            id="a snapshot's total",
        ),
        pytest.param(
            ["UPDATE ingest.snapshot SET root = sha256('x') WHERE epoch = 1 AND tenant_id = 'acme'"],
            [
                ("I3", OF_LEAF, {**DAY, "epoch": 1, "snapshot_id": ...}),
                ("I3", OF_ROOT, {**DAY, "epoch": 1, "snapshot_id": ...}),
            ],
            id="a snapshot's root",
        ),
        pytest.param(
            ["DELETE FROM ingest.snapshot WHERE epoch = 1 AND tenant_id = 'bolt'"],
            [
                ("I3", "an epoch's entries are not those of its snapshots", {"epoch": 1}),
                ("I3", "an epoch's snapshots are not as many", {"epoch": 1}),
                ("I3", OF_SUM, {**DAY, "tenant_id": "bolt", "epoch": 1, "snapshot_id": ...}),
                ("I9", "the root over an epoch's snapshots does not follow from them", {"epoch": 1}),
            ],
            id="a removed snapshot",
        ),
        pytest.param(
            ["UPDATE ingest.epoch SET root = sha256('x') WHERE epoch = 1"],
            [
                ("I9", "an epoch's root does not follow from what it is made of", {"epoch": 1}),
                ("I9", "an epoch does not follow on the root before it", {"epoch": 2}),
            ],
            id="an epoch's root",
        ),
        pytest.param(
            ["DELETE FROM ingest.snapshot WHERE epoch = 1", "DELETE FROM ingest.epoch WHERE epoch = 1"],
            [("I9", "an epoch is missing", {"epoch": 1})],
            id="a removed epoch",
        ),
        pytest.param(
            ["DELETE FROM ingest.snapshot WHERE epoch = 2", "DELETE FROM ingest.epoch WHERE epoch = 2"],
            [("I9", "an epoch is missing", {"epoch": 2})],
            id="the last sealed epoch",
        ),
        pytest.param(
            [
                """UPDATE ingest.epoch
                   SET state = 'CLOSED', sealed_at = NULL, entry_count = NULL, snapshot_count = NULL,
                       snapshots_root = NULL, previous_root = NULL, root = NULL
                   WHERE epoch = 1"""
            ],
            [
                ("I3", "an epoch that is not sealed has snapshots", {"epoch": 1}),
                ("I9", "an epoch is sealed before the one before it", {"epoch": 2}),
            ],
            id="an epoch's state",
        ),
        pytest.param(
            ["DELETE FROM ingest.epoch WHERE epoch = 3"],
            [("I9", "the last epoch is not open", {})],
            id="the open epoch",
        ),
        pytest.param(
            ["DELETE FROM ingest.snapshot", "DELETE FROM ingest.epoch"],
            [("I9", "the last epoch is not open", {})],
            id="the whole chain",
        ),
        pytest.param(
            ["UPDATE quota.usage_hour SET quantity = quantity + 1 WHERE tenant_id = 'bolt'"],
            [("I4", "the counter of an hour …", {**HOUR, "tenant_id": "bolt"})],
            id="a counter",
        ),
    ],
)
async def test_what_is_tampered_with_is_named_and_nothing_else(
    services: Services, database: Database, statements: list[str], expected: list[tuple[str, str, dict[str, Any]]]
) -> None:
    await new_ledger(services)
    await settled(services, database)
    counted = {each: violations_counted(each) for each, _, _ in expected}
    await tamper(database, *statements)
    found = await audit(services)
    told = [(each.invariant, _shortened(each.problem), _named(services, place_of(each))) for each in found]
    assert sorted(told, key=str) == sorted(((*what, dict(sorted(place.items()))) for *what, place in expected), key=str)
    assert all(each.expected != each.found for each in found)
    for invariant, before in counted.items():
        assert violations_counted(invariant) - before == sum(each.invariant == invariant for each in found)


def violations_counted(invariant: str) -> float:
    return REGISTRY.get_sample_value("usameter_invariant_violations_total", {"invariant": invariant}) or 0


def _shortened(problem: str) -> str:
    return problem.replace(" is not entries and open reservations", " …")


def _named(services: Services, place: dict[str, Any]) -> dict[str, Any]:
    """The place with the event by its key, and any snapshot."""
    for key in "abcde":
        if place.get("event_id") == f"evt_{event_id_of_key(services.org_id, key).hex}":
            del place["event_id"]
            place["event"] = key
    if "snapshot_id" in place:
        place["snapshot_id"] = ...
    return dict(sorted(place.items()))


async def test_nothing_of_what_a_customer_sent_is_in_a_violation(services: Services, database: Database) -> None:
    await new_ledger(services)
    await tamper(database, """UPDATE ingest.usage_event SET metadata = '{"secret":"hunter2"}'""")
    found = await audit(services)
    assert len(found) == 5
    assert not any(word in str(each) for each in found for word in ("hunter2", "region"))


async def test_a_live_ledger_has_no_violation(services: Services, database: Database) -> None:
    """I1 to I4 and I9 under recording, correcting and sealing."""
    stop = asyncio.Event()

    async def keep_recording(writer: int) -> None:
        for number in itertools.count():
            moments = [NOW - timedelta(hours=7 * i) for i in range(10)]
            events = [event(f"{writer}.{number}.{i}", at=at, tenant=f"t{i % 3}") for i, at in enumerate(moments)]
            made = await record(services, *events)
            await correct(services, made[0], None if number % 2 else "1")
            if stop.is_set():
                return

    async def keep_sealing() -> None:
        while not stop.is_set():
            await seal(services)

    async with asyncio.TaskGroup() as tasks:
        for writer in range(3):
            tasks.create_task(keep_recording(writer))
        tasks.create_task(keep_sealing())
        async with small_pages(database) as auditing:
            for _ in range(10):
                assert await audit_all(auditing, services.org_id) == []
                assert await audit(services) == []
        stop.set()
    assert await fetch_value(database, "SELECT max(epoch) FROM ingest.epoch") > 3
    await settled(services, database)
    assert await audit(services) == []


def small_pages(database: Database) -> Any:
    return _SmallPages(database)


class _SmallPages:
    """The audit in pages of a handful, so that there are many."""

    def __init__(self, database: Database) -> None:
        self._pool = open_pool(database.role_url("ingest"), application_name="test")

    async def __aenter__(self) -> AuditingService:
        return AuditingService(AuditStore(await self._pool.__aenter__()), epochs_max=1, day_events_max=7, entries_max=5)

    async def __aexit__(self, *error: Any) -> None:
        await self._pool.__aexit__(*error)


async def audit_all(auditing: AuditingService, org_id: OrgId) -> list[Any]:
    place: AuditPlace | None = AuditPlace()
    found: list[Any] = []
    while place is not None:
        audited = await auditing.audit(org_id, place)
        found += audited.violations
        place = audited.next_place
    return found


async def test_pages_leave_nothing_out_and_repeat_nothing(services: Services, database: Database) -> None:
    moments = [NOW - timedelta(hours=5 * i) for i in range(40)]
    for tenant in ("acme", "bolt"):
        await record(services, *[event(f"{tenant}{i}", at=at, tenant=tenant) for i, at in enumerate(moments)])
        await seal(services)
    await tamper(
        database,
        "UPDATE ingest.usage_event SET leaf_hash = sha256('x')",
        "UPDATE ingest.usage_day SET quantity = quantity + 1",
        "UPDATE ingest.usage_hour SET quantity = quantity + 1",
    )
    async with small_pages(database) as auditing:
        in_small = await audit_all(auditing, services.org_id)
    days = len({moment.date() for moment in moments})
    assert len(in_small) == 2 * (40 + days + 40 + days + days)
    in_large = [each for each in await audit(services) if each.invariant != "I4"]
    assert sorted((each.invariant, each.problem, sorted(each.place.items(), key=str)) for each in in_small) == sorted(
        (each.invariant, each.problem, sorted(place_of(each).items(), key=str)) for each in in_large
    )


async def test_an_organization_is_not_told_of_another(services: Services, database: Database) -> None:
    await new_ledger(services)
    await tamper(database, "UPDATE ingest.usage_event SET leaf_hash = sha256('x')")
    _, other_key = await new_organization(database, "other")
    assert await audit_ingest(services.ingest, (("authorization", f"Bearer {other_key}"),)) == []


async def test_a_token_of_another_list_is_refused(services: Services) -> None:
    stub: Any = audit_pb2_grpc.AuditServiceStub(services.ingest)
    for token in ("nonsense", "WzFd"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.AuditLedger(
                ingest_audit_pb2.AuditLedgerRequest(page_token=token), metadata=services.metadata, timeout=10
            )
        assert reason_of(caught.value) == "INVALID_ARGUMENT"


async def test_events_of_the_first_days_there_are_are_audited_like_any_other(services: Services) -> None:
    await record(services, event("first", at=datetime(1, 1, 2, tzinfo=UTC)))
    await seal(services)
    assert await audit(services) == []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(services, event("before", at=datetime(1, 1, 1, 23, 59, 59, tzinfo=UTC)))
    assert "first day of the calendar" in (caught.value.details() or "")
