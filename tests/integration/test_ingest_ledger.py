"""The ledger over gRPC: corrections, usage, lists, epochs and snapshots."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg
import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, new_organization, open_services, reason_of
from tests.support.sql import fetch_rows, fetch_value
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2, snapshot_pb2, usage_pb2
from usameter.quota.v1 import quota_pb2
from usameter_proof import ledger_format
from usameter_proof.merkle import MerkleRoot

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
MARCH = {"start_date": datetime(2026, 3, 1, tzinfo=UTC), "end_date": datetime(2026, 4, 1, tzinfo=UTC)}


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock(NOW)) as running:
        yield running


def event(
    key: str, *, at: datetime = NOW, quantity: str = "1", tenant: str = "acme", kind: str = "req"
) -> dict[str, Any]:
    return {
        "event_type": kind,
        "tenant_id": tenant,
        "quantity_decimal": quantity,
        "idempotency_key": key,
        "timestamp": at,
    }


async def record(services: Services, *events: dict[str, Any]) -> list[str]:
    request = event_pb2.RecordEventsRequest(events=list(events))
    answer = await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)
    return [result.event_id for result in answer.results]


async def usage(services: Services, **query: Any) -> dict[str, tuple[str, int]]:
    request = usage_pb2.GetUsageRequest(**{**MARCH, **query})
    answer = await services.usage.GetUsage(request, metadata=services.metadata, timeout=10)
    return {
        group.event_type or group.tenant_id or group.date or group.hour.ToDatetime(UTC).isoformat(): (
            group.total_quantity,
            group.event_count,
        )
        for group in answer.usage
    }


async def void(services: Services, event_id: str) -> Any:
    request = event_pb2.VoidEventRequest(event_id=event_id, reason="sent by mistake")
    return await services.events.VoidEvent(request, metadata=services.metadata, timeout=10)


async def amend(services: Services, event_id: str, quantity: str) -> Any:
    request = event_pb2.AmendEventRequest(event_id=event_id, quantity_decimal=quantity, reason="measured again")
    return await services.events.AmendEvent(request, metadata=services.metadata, timeout=10)


async def seal(services: Services, day: str = "") -> list[Any]:
    request = snapshot_pb2.SealEpochsRequest(date=day)
    answer = await services.snapshots.SealEpochs(request, metadata=services.cron_metadata, timeout=20)
    return list(answer.sealed)


async def snapshots(services: Services, after_epoch: int = 0, limit: int | None = None) -> list[Any]:
    found: list[Any] = []
    token: str | None = ""
    while token is not None:
        request = snapshot_pb2.ListSnapshotsRequest(
            org_id=str(services.org_id), after_epoch=after_epoch, page_token=token, limit=limit
        )
        page = await services.snapshots.ListSnapshots(request, metadata=services.service_metadata, timeout=10)
        found.extend(page.snapshots)
        token = page.next_page_token if page.HasField("next_page_token") else None
    return found


async def set_limit(services: Services, value: str) -> None:
    request = quota_pb2.SetQuotaRequest(
        tenant_id="acme",
        event_type="req",
        limit_value=value,
        enforcement_mode=quota_pb2.HARD,
        period=quota_pb2.MONTHLY,
    )
    await services.quotas.SetQuota(request, metadata=services.metadata, timeout=10)


async def used(services: Services) -> str:
    request = quota_pb2.GetQuotaRequest(tenant_id="acme", event_type="req")
    answer = await services.quotas.GetQuota(request, metadata=services.metadata, timeout=10)
    current: str = answer.current
    return current


async def test_usage_is_summed_by_each_grouping(services: Services) -> None:
    await record(
        services,
        event("a", quantity="1.5"),
        event("b", at=NOW - timedelta(days=1), quantity="0.25", tenant="bolt"),
        event("c", at=NOW + timedelta(minutes=3), kind="mb", quantity="12345678901234.123456"),
    )
    assert await usage(services) == {"mb": ("12345678901234.123456", 1), "req": ("1.75", 2)}
    assert await usage(services, group_by=usage_pb2.tenant) == {
        "acme": ("12345678901235.623456", 2),
        "bolt": ("0.25", 1),
    }
    assert await usage(services, group_by=usage_pb2.day, event_type="req") == {
        "2026-03-09": ("0.25", 1),
        "2026-03-10": ("1.5", 1),
    }
    assert await usage(services, group_by=usage_pb2.hour, tenant_id="bolt") == {
        "2026-03-09T12:00:00+00:00": ("0.25", 1)
    }


async def test_usage_is_exact_at_any_bound(services: Services) -> None:
    moments = [NOW + timedelta(minutes=minute) for minute in (-130, -61, -60, -59, -1, 0, 4)]
    await record(services, *[event(f"k{i}", at=moment) for i, moment in enumerate(moments)])
    bounds = sorted({*moments, *(moment + timedelta(seconds=1) for moment in moments)})
    for start, end in itertools.combinations(bounds, 2):
        expected = sum(start <= moment < end for moment in moments)
        found = await usage(services, start_date=start, end_date=end)
        assert found == ({"req": (str(expected), expected)} if expected else {})


async def test_void_takes_the_quantity_back_once(services: Services) -> None:
    await set_limit(services, "10")
    kept, voided = await record(services, event("a", quantity="4"), event("b", quantity="6"))
    correction = await void(services, voided)
    assert (correction.kind, correction.quantity_delta, correction.quantity_decimal) == (event_pb2.VOID, "-6", "0")
    assert await usage(services) == {"req": ("4", 2)}
    await until(lambda: _equals(used(services), "4"), "quota gets the quantity back")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await void(services, voided)
    assert reason_of(caught.value) == "ALREADY_EXISTS"
    request = event_pb2.RecordEventsRequest(**event("b", quantity="6"))
    again = await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)
    assert again.deduplicated and again.voided
    assert kept != voided


async def _equals(found: Any, expected: object) -> bool:
    return bool(await found == expected)


async def test_amend_replaces_the_quantity_and_needs_quota_upwards(services: Services) -> None:
    await set_limit(services, "10")
    first, second = await record(services, event("a", quantity="4"), event("b", quantity="2"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await amend(services, first, "8.000001")
    assert reason_of(caught.value) == "QUOTA_EXCEEDED"
    assert (await amend(services, first, "8")).quantity_delta == "4"
    assert await used(services) == "10"
    assert (await amend(services, second, "0.5")).quantity_delta == "-1.5"
    assert await usage(services) == {"req": ("8.5", 2)}
    await until(lambda: _equals(used(services), "8.5"), "quota gets the difference back")


async def test_amending_to_the_same_quantity_or_an_unknown_event_is_refused(services: Services) -> None:
    (only,) = await record(services, event("a", quantity="4"))
    for event_id, quantity, reason in (
        (only, "4.0", "INVALID_ARGUMENT"),
        ("evt_" + "0" * 32, "4", "NOT_FOUND"),
        ("evt_xyz", "4", "INVALID_ARGUMENT"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await amend(services, event_id, quantity)
        assert reason_of(caught.value) == reason


async def test_two_corrections_at_once_leave_one(services: Services, database: Database) -> None:
    (only,) = await record(services, event("a", quantity="4"))
    answers = await asyncio.gather(
        *(void(services, only) for _ in range(8)),
        *(amend(services, only, "9") for _ in range(8)),
        return_exceptions=True,
    )
    assert sum(not isinstance(answer, Exception) for answer in answers) == 1
    assert await fetch_value(database, "SELECT count(*) FROM ingest.correction") == 1


async def test_events_are_listed_latest_first_in_stable_pages(services: Services) -> None:
    made = await record(services, *[event(f"k{i}", at=NOW - timedelta(minutes=i // 3)) for i in range(30)])
    seen: list[str] = []
    token: str | None = ""
    while token is not None:
        request = event_pb2.ListEventsRequest(limit=7, page_token=token)
        page = await services.events.ListEvents(request, metadata=services.metadata, timeout=10)
        seen.extend(each.id for each in page.events)
        token = page.next_page_token if page.HasField("next_page_token") else None
        # A newer event shifts no page.
        await record(services, event(f"later{len(seen)}", at=NOW + timedelta(seconds=len(seen))))
    assert seen == sorted(made, key=lambda each: (-(made.index(each) // 3), each), reverse=True)


async def test_lists_filter_by_tenant_type_and_time(services: Services) -> None:
    ids = await record(
        services,
        event("a"),
        event("b", tenant="bolt"),
        event("c", kind="mb"),
        event("d", at=NOW - timedelta(hours=1)),
    )

    async def listed(**filters: Any) -> set[str]:
        request = event_pb2.ListEventsRequest(**filters)
        page = await services.events.ListEvents(request, metadata=services.metadata, timeout=10)
        return {each.id for each in page.events}

    assert await listed(tenant_id="bolt") == {ids[1]}
    assert await listed(event_type="mb", tenant_id="acme") == {ids[2]}
    assert await listed(start_date=NOW - timedelta(hours=1), end_date=NOW) == {ids[3]}
    assert await listed(start_date=NOW) == {ids[0], ids[1], ids[2]}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listed(start_date=NOW, end_date=NOW)
    assert reason_of(caught.value) == "INVALID_ARGUMENT"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listed(page_token="nonsense")
    assert reason_of(caught.value) == "INVALID_ARGUMENT"


async def test_an_organization_sees_nothing_of_another(services: Services, database: Database) -> None:
    (only,) = await record(services, event("a"))
    _, other_key = await new_organization(database, "other")
    metadata = (("authorization", f"Bearer {other_key}"),)
    page = await services.events.ListEvents(event_pb2.ListEventsRequest(), metadata=metadata, timeout=10)
    assert not page.events
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.events.GetEvent(event_pb2.GetEventRequest(event_id=only), metadata=metadata, timeout=10)
    assert reason_of(caught.value) == "NOT_FOUND"
    # The same key in another organization is another event.
    answer = await services.events.RecordEvents(
        event_pb2.RecordEventsRequest(**event("a")), metadata=metadata, timeout=10
    )
    assert not answer.deduplicated and answer.event_id != only


async def test_sealing_gives_snapshots_whose_roots_re_derive_from_the_entries(
    services: Services, database: Database
) -> None:
    """I3 and I9."""
    ids = await record(
        services,
        *[event(f"a{i}", at=NOW - timedelta(hours=i), quantity=f"{i + 1}.5") for i in range(40)],
        *[event(f"b{i}", tenant="Bolt", kind="mb") for i in range(5)],
        # More than come in one piece.
        *[event(f"c{i}", tenant="big") for i in range(600)],
    )
    await void(services, ids[3])
    (first,) = await seal(services)
    await record(services, event("late", at=NOW - timedelta(days=40)))
    (second,) = await seal(services)
    assert (first.epoch, second.epoch, second.entry_count, second.snapshot_count) == (1, 2, 1, 1)
    assert first.entry_count == 646

    found = await snapshots(services, limit=2)
    assert [(each.epoch, each.tenant_id, each.event_type, each.day) for each in found] == sorted(
        (each.epoch, each.tenant_id, each.event_type, each.day) for each in found
    )
    previous = ledger_format.ZERO_ROOT
    for sealed in (first, second):
        previous = await _derive_epoch_root(services, database, [s for s in found if s.epoch == sealed.epoch], previous)
        assert sealed.root == previous.hex()
    assert await snapshots(services, after_epoch=1) == [each for each in found if each.epoch == 2]


async def _derive_epoch_root(services: Services, database: Database, sealed: list[Any], previous_root: bytes) -> bytes:
    tree = MerkleRoot()
    for snapshot in sealed:
        day = date.fromisoformat(snapshot.day)
        key = (snapshot.epoch, snapshot.tenant_id, snapshot.event_type, day)
        events = await fetch_rows(
            database,
            """SELECT * FROM ingest.usage_event WHERE epoch = $1 AND tenant_id = $2 AND event_type = $3
               AND (occurred_at AT TIME ZONE 'UTC')::date = $4""",
            *key,
        )
        corrections = await fetch_rows(
            database,
            """SELECT * FROM ingest.correction WHERE epoch = $1 AND tenant_id = $2 AND event_type = $3
               AND (occurred_at AT TIME ZONE 'UTC')::date = $4""",
            *key,
        )
        leaves = [(row["event_id"].bytes, 0, _event_leaf(row)) for row in events]
        leaves += [(row["event_id"].bytes, 1, _correction_leaf(row)) for row in corrections]
        entries = MerkleRoot()
        for _, _, leaf in sorted(leaves):
            entries.add(leaf)
        total = sum((row["quantity"] for row in events), Decimal(0))
        total += sum((row["quantity_delta"] for row in corrections), Decimal(0))
        assert (snapshot.entry_count, Decimal(snapshot.total), snapshot.root) == (len(leaves), total, entries.root())
        tree.add(
            ledger_format.snapshot_leaf(
                org_id=services.org_id,
                epoch=snapshot.epoch,
                tenant_id=snapshot.tenant_id,
                event_type=snapshot.event_type,
                day=day,
                entry_count=snapshot.entry_count,
                quantity=Decimal(snapshot.total),
                root=snapshot.root,
            )
        )
    return ledger_format.epoch_root(
        org_id=services.org_id, epoch=sealed[0].epoch, previous_root=previous_root, snapshots_root=tree.root()
    )


def _event_leaf(row: dict[str, Any]) -> bytes:
    content = ledger_format.request_hash(
        row["tenant_id"],
        row["event_type"],
        ledger_format.canonical(row["quantity"]),
        row["metadata"].encode(),
    )
    assert content == row["request_hash"]
    prefix = ledger_format.event_leaf_prefix(
        org_id=row["org_id"],
        event_id=row["event_id"],
        content_hash=content,
        occurred_at=row["occurred_at"],
        timestamp_given=row["timestamp_given"],
        idempotency_key=row["idempotency_key"],
    )
    leaf = ledger_format.leaf_hash(prefix, epoch=row["epoch"], ingested_at=row["ingested_at"])
    assert leaf == row["leaf_hash"], "the database and the specification hash alike"
    return leaf


def _correction_leaf(row: dict[str, Any]) -> bytes:
    prefix = ledger_format.correction_leaf_prefix(
        org_id=row["org_id"],
        event_id=row["event_id"],
        kind=row["kind"],
        quantity_delta=row["quantity_delta"],
        reason=row["reason"],
        occurred_at=row["occurred_at"],
    )
    leaf = ledger_format.leaf_hash(prefix, epoch=row["epoch"], ingested_at=row["ingested_at"])
    assert leaf == row["leaf_hash"], "the database and the specification hash alike"
    return leaf


async def test_sealing_an_empty_epoch_does_nothing(services: Services) -> None:
    assert await seal(services) == []
    await record(services, event("a"))
    assert len(await seal(services)) == 1
    assert await seal(services) == []


async def test_with_a_date_only_what_was_ingested_by_its_end_is_sealed(services: Services) -> None:
    await record(services, event("a"))
    today = datetime.now(UTC).date()
    assert await seal(services, (today - timedelta(days=1)).isoformat()) == []
    assert len(await seal(services, today.isoformat())) == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await seal(services, "2026-02-30")
    assert reason_of(caught.value) == "INVALID_ARGUMENT"


async def test_entries_recorded_while_sealing_land_in_exactly_one_epoch(services: Services, database: Database) -> None:
    """I2: rollups equal entries per epoch, whatever the seal cuts through."""
    stop = asyncio.Event()

    async def keep_recording(writer: int) -> int:
        for number in itertools.count():
            await record(services, *[event(f"{writer}.{number}.{i}") for i in range(20)])
            if stop.is_set():
                return (number + 1) * 20
        raise AssertionError

    sealed = []
    # A group, so that a writer that fails ends the test: without entries nothing is sealed any more.
    async with asyncio.TaskGroup() as tasks:
        writers = [tasks.create_task(keep_recording(writer)) for writer in range(4)]
        while len(sealed) < 10:
            sealed.extend(await seal(services))
        stop.set()
    made = sum(writer.result() for writer in writers)
    sealed.extend(await seal(services))
    assert sum(each.entry_count for each in sealed) == made
    differences = await fetch_rows(
        database,
        """SELECT epoch FROM (SELECT epoch, count(*) AS entries FROM ingest.usage_event GROUP BY epoch) AS e
           FULL JOIN (SELECT epoch, sum(event_count) AS entries FROM ingest.usage_day GROUP BY epoch) AS r
           USING (epoch) WHERE e.entries IS DISTINCT FROM r.entries""",
    )
    assert differences == []
    assert await fetch_value(database, "SELECT sum(event_count)::bigint FROM ingest.usage_hour") == made


@pytest.mark.parametrize(
    ("spoil", "mend"),
    [
        ("UPDATE ingest.usage_day SET event_count = 2", "UPDATE ingest.usage_day SET event_count = 1"),
        ("UPDATE ingest.usage_day SET quantity = 1.000001", "UPDATE ingest.usage_day SET quantity = 1"),
        ("UPDATE ingest.usage_day SET tenant_id = 'b'", "UPDATE ingest.usage_day SET tenant_id = 'acme'"),
        ("UPDATE ingest.usage_day SET epoch = 9", "UPDATE ingest.usage_day SET epoch = 1"),
        (
            """INSERT INTO ingest.usage_day SELECT org_id, 'b', event_type, day, epoch, slot, 1, 0, 1
               FROM ingest.usage_day""",
            "DELETE FROM ingest.usage_day WHERE tenant_id = 'b'",
        ),
    ],
    ids=["count", "quantity", "tenant", "epoch", "more"],
)
async def test_rollups_that_disagree_with_entries_are_not_sealed(
    services: Services, database: Database, spoil: str, mend: str
) -> None:
    await record(services, event("a"))
    connection = await asyncpg.connect(database.admin_url)
    await connection.execute(spoil)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await seal(services)
    assert reason_of(caught.value) == "INTERNAL"
    assert await connection.fetchval("SELECT state FROM ingest.epoch WHERE epoch = 1") == "CLOSED"
    assert await connection.fetchval("SELECT count(*) FROM ingest.snapshot") == 0
    await connection.execute(mend)
    await connection.close()
    await seal(services)
    assert await fetch_value(database, "SELECT state FROM ingest.epoch WHERE epoch = 1") == "SEALED"


async def test_marks_show_on_events_and_never_go_back(services: Services) -> None:
    (only,) = await record(services, event("a"))
    await seal(services)
    (snapshot,) = await snapshots(services)

    async def mark(invoice_id: str, version: int) -> str:
        request = snapshot_pb2.MarkSnapshotsRequest(
            org_id=str(services.org_id),
            marks=[{"snapshot_id": snapshot.id, "invoice_id": invoice_id, "billed_at": NOW, "version": version}],
        )
        await services.snapshots.MarkSnapshots(request, metadata=services.service_metadata, timeout=10)
        request = event_pb2.GetEventRequest(event_id=only)
        found = await services.events.GetEvent(request, metadata=services.metadata, timeout=10)
        shown: str = found.invoice_id
        return shown

    assert await mark("inv_1", 2) == "inv_1"
    assert await mark("inv_0", 1) == "inv_1"
    assert await mark("inv_2", 3) == "inv_2"


async def test_the_service_role_can_neither_change_nor_delete_entries(services: Services, database: Database) -> None:
    await record(services, event("a"))
    connection = await asyncpg.connect(database.role_url("ingest"))
    try:
        for table, forbidden in itertools.product(
            ("usage_event", "correction", "snapshot"), ("UPDATE ingest.{} SET org_id = org_id", "DELETE FROM ingest.{}")
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(forbidden.format(table))
        for schema, table in (("quota", "quota_head"), ("identity", "api_key"), ("billing", "invoice")):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(f"SELECT * FROM {schema}.{table}")
    finally:
        await connection.close()


def test_ids_of_events_are_what_the_format_says() -> None:
    org_id = UUID(int=7)
    expected = hashlib.sha256(b"usameter.event.v1" + org_id.bytes + b"k").digest()[:16]
    assert ledger_format.event_id_of_key(org_id, "k").bytes == expected
