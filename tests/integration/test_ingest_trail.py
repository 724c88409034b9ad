"""The entries behind snapshots and the list of events, of which any number and any size come page by page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, open_services
from usameter.ingest.v1 import event_pb2, ledger_pb2, ledger_pb2_grpc, snapshot_pb2
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_ingest.service import leaf_order, trail
from usameter_ingest.store.ledger import LedgerStore

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
# What gRPC clients take unless they are told otherwise.
_ANSWER_BYTES_MAX = 4 * 1024 * 1024


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock(NOW)) as running:
        yield running


async def record(services: Services, keys: list[str], *, days_ago: int = 0, metadata: Any = None) -> list[str]:
    events = [
        event_pb2.EventInput(
            event_type="req",
            tenant_id="acme",
            idempotency_key=key,
            timestamp=timestamp_from_datetime(NOW - timedelta(days=days_ago)),
            metadata=metadata,
        )
        for key in keys
    ]
    request = event_pb2.RecordEventsRequest(events=events)
    answer = await services.events.RecordEvents(request, metadata=services.metadata, timeout=20)
    return [result.event_id for result in answer.results]


async def seal(services: Services) -> list[str]:
    """The ids of all snapshots, in the order of the ledger."""
    await services.snapshots.SealEpochs(snapshot_pb2.SealEpochsRequest(), metadata=services.cron_metadata, timeout=20)
    request = snapshot_pb2.ListSnapshotsRequest(org_id=str(services.org_id))
    answer = await services.snapshots.ListSnapshots(request, metadata=services.service_metadata, timeout=10)
    return [each.id for each in answer.snapshots]


async def snapshot_pages(
    services: Services, snapshot_id: str, limit: int
) -> list[ledger_pb2.ListSnapshotEventsResponse]:
    stub: Any = ledger_pb2_grpc.LedgerServiceStub(services.ingest)
    pages: list[ledger_pb2.ListSnapshotEventsResponse] = []
    while not pages or pages[-1].HasField("next_page_token"):
        token = pages[-1].next_page_token if pages else ""
        request = ledger_pb2.ListSnapshotEventsRequest(snapshot_id=snapshot_id, limit=limit, page_token=token)
        pages.append(await stub.ListSnapshotEvents(request, metadata=services.metadata, timeout=20))
    return pages


async def entries(services: Services, snapshot_id: str, limit: int = 1000) -> list[ledger_pb2.LedgerEntry]:
    return [entry for page in await snapshot_pages(services, snapshot_id, limit) for entry in page.events]


@pytest.mark.parametrize("stretch", [1, 4, 100])
async def test_a_large_snapshot_has_the_same_entries_in_the_same_order(
    services: Services, monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    ids = await record(services, [f"k{number}" for number in range(20)])
    for event_id in ids[::7]:
        await services.events.VoidEvent(
            event_pb2.VoidEventRequest(event_id=event_id, reason="twice"), metadata=services.metadata, timeout=10
        )
    await record(services, [f"other day {number}" for number in range(3)], days_ago=1)
    small, large = await seal(services)
    whole = {snapshot_id: await entries(services, snapshot_id) for snapshot_id in (small, large)}
    assert [len(each) for each in whole.values()] == [3, 23]
    monkeypatch.setattr(trail, "LARGE_SNAPSHOT_ENTRIES", 3)
    monkeypatch.setattr(leaf_order, "STRETCH_PLACES", stretch)
    for limit in (1, 3, 4, 22, 23, 1000):
        assert await entries(services, large, limit) == whole[large]
    # From any place in any of them, whatever was read before.
    stub: Any = ledger_pb2_grpc.LedgerServiceStub(services.ingest)
    for order in ([small, large], [large, small]):
        expected = [entry for snapshot_id in order for entry in whole[snapshot_id]]
        first = whole[order[0]]
        for number in range(len(first) - 1, -1, -1):
            is_correction = first[number].HasField("correction")
            event_id = first[number].correction.event_id if is_correction else first[number].event.id
            request = ledger_pb2.ReadEntriesRequest(
                org_id=str(services.org_id),
                snapshot_ids=order,
                after=ledger_pb2.EntryPlace(event_id=event_id, correction=is_correction),
                limit=9,
            )
            answer = await stub.ReadEntries(request, metadata=services.service_metadata, timeout=10)
            assert list(answer.entries) == expected[number + 1 : number + 10]
            assert not answer.ends_early


async def test_pages_of_a_large_snapshot_read_what_they_show_and_only_one_of_them_all_of_it(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_whole: list[int] = []
    looked_up: list[int] = []
    read_places, list_entries_at = LedgerStore.read_places, LedgerStore.list_entries_at

    async def counted_places(self: LedgerStore, *arguments: Any, **options: Any) -> bytes:
        places = await read_places(self, *arguments, **options)
        sorted_whole.append(len(places) // 17)
        return places

    async def counted_entries(self: LedgerStore, *arguments: Any) -> Any:
        looked_up.append(len(arguments[-1]))
        return await list_entries_at(self, *arguments)

    monkeypatch.setattr(LedgerStore, "read_places", counted_places)
    monkeypatch.setattr(LedgerStore, "list_entries_at", counted_entries)
    for batch in range(3):
        await record(services, [f"{batch}/{number}" for number in range(1000)])
    (snapshot_id,) = await seal(services)
    pages = await snapshot_pages(services, snapshot_id, 100)
    assert len({entry.event.id for page in pages for entry in page.events}) == 3_000
    assert sorted_whole == [3_000]
    # One more than a page shows tells whether there is another.
    assert looked_up == [101] * 29 + [100]


async def test_pages_end_before_they_grow_too_large(services: Services) -> None:
    ids = await record(services, [f"text {number}" for number in range(220)], metadata={"text": "x" * 16_000})
    # As much JSON each, which is 88 KB as a message.
    ids += await record(services, [f"numbers {number}" for number in range(40)], metadata={"n": [1] * 8_000})
    (snapshot_id,) = await seal(services)
    listed: list[event_pb2.ListEventsResponse] = []
    while not listed or listed[-1].HasField("next_page_token"):
        token = listed[-1].next_page_token if listed else ""
        request = event_pb2.ListEventsRequest(limit=1000, page_token=token)
        listed.append(await services.events.ListEvents(request, metadata=services.metadata, timeout=30))
    snapshot = await snapshot_pages(services, snapshot_id, 1000)
    for pages, found in (
        (listed, [event.id for page in listed for event in page.events]),
        (snapshot, [entry.event.id for page in snapshot for entry in page.events]),
    ):
        assert sorted(found) == sorted(ids)
        assert len(pages) > 1
        assert all(page.ByteSize() < _ANSWER_BYTES_MAX for page in pages)
    stub: Any = ledger_pb2_grpc.LedgerServiceStub(services.ingest)
    request = ledger_pb2.ReadEntriesRequest(org_id=str(services.org_id), snapshot_ids=[snapshot_id], limit=1001)
    answer = await stub.ReadEntries(request, metadata=services.service_metadata, timeout=10)
    assert answer.ends_early
    assert list(answer.entries) == list(snapshot[0].events)
