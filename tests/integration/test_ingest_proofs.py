"""The sealed ledger as it is shown and proven: head, chain, entries behind snapshots, inclusion."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
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
from usameter.ingest.v1 import (
    event_pb2,
    ledger_pb2,
    ledger_pb2_grpc,
    proof_pb2,
    proof_pb2_grpc,
    snapshot_pb2,
)
from usameter_core.grpc.timestamps import datetime_from_timestamp
from usameter_ingest.service import proving
from usameter_proof import ledger_format
from usameter_proof.inclusion import root_of_path
from usameter_proof.merkle import MerkleRoot

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock(NOW)) as running:
        yield running


def event(
    key: str | None, *, at: datetime | None = NOW, quantity: str = "1", tenant: str = "acme", kind: str = "req"
) -> Any:
    return event_pb2.EventInput(
        event_type=kind, tenant_id=tenant, quantity_decimal=quantity, idempotency_key=key, timestamp=at
    )


async def record(services: Services, *events: Any) -> list[str]:
    request = event_pb2.RecordEventsRequest(events=events)
    answer = await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)
    return [result.event_id for result in answer.results]


async def void(services: Services, event_id: str) -> None:
    request = event_pb2.VoidEventRequest(event_id=event_id, reason="sent by mistake")
    await services.events.VoidEvent(request, metadata=services.metadata, timeout=10)


async def seal(services: Services) -> None:
    request = snapshot_pb2.SealEpochsRequest()
    await services.snapshots.SealEpochs(request, metadata=services.cron_metadata, timeout=20)


async def snapshots(services: Services) -> list[Any]:
    request = snapshot_pb2.ListSnapshotsRequest(org_id=str(services.org_id))
    answer = await services.snapshots.ListSnapshots(request, metadata=services.service_metadata, timeout=10)
    return list(answer.snapshots)


def ledger(services: Services) -> Any:
    return ledger_pb2_grpc.LedgerServiceStub(services.ingest)


def proofs(services: Services) -> Any:
    return proof_pb2_grpc.ProofServiceStub(services.ingest)


async def entries(services: Services, snapshot_id: str, *, limit: int = 1000) -> list[Any]:
    found: list[Any] = []
    token: str | None = ""
    while token is not None:
        request = ledger_pb2.ListSnapshotEventsRequest(snapshot_id=snapshot_id, limit=limit, page_token=token)
        page = await ledger(services).ListSnapshotEvents(request, metadata=services.metadata, timeout=10)
        assert 0 < len(page.events) <= limit
        found.extend(page.events)
        token = page.next_page_token if page.HasField("next_page_token") else None
    return found


def moment(message: Any) -> datetime:
    return datetime_from_timestamp(message, field="")


def leaf_of(org_id: UUID, entry: Any) -> bytes:
    """The leaf by docs/ledger-format.md, from what is shown."""
    if entry.HasField("event"):
        shown = entry.event
        prefix = ledger_format.event_leaf_prefix(
            org_id=org_id,
            event_id=UUID(shown.id[4:]),
            content_hash=ledger_format.request_hash(
                shown.tenant_id, shown.event_type, shown.quantity_decimal, shown.metadata.encode()
            ),
            occurred_at=moment(shown.timestamp),
            timestamp_given=shown.timestamp_given,
            idempotency_key=shown.idempotency_key if shown.HasField("idempotency_key") else None,
        )
    else:
        shown = entry.correction
        prefix = ledger_format.correction_leaf_prefix(
            org_id=org_id,
            event_id=UUID(shown.event_id[4:]),
            kind=event_pb2.CorrectionKind.Name(shown.kind),
            quantity_delta=Decimal(shown.quantity_delta),
            reason=shown.reason,
            occurred_at=moment(shown.timestamp),
        )
    return ledger_format.leaf_hash(prefix, epoch=entry.epoch, ingested_at=moment(entry.ingested_at))


def root_over(leaves: Sequence[bytes]) -> bytes:
    tree = MerkleRoot()
    tree.add(b"".join(leaves))
    return tree.root()


async def test_the_entries_of_a_snapshot_are_its_leaves_in_order_page_by_page(services: Services) -> None:
    """I3: a snapshot's root re-derives from the entries that are shown for it."""
    ids = await record(
        services,
        *(event(f"k{number}", quantity=f"{number}.5") for number in range(7)),
        event(None),
        event("no time", at=None),
    )
    await void(services, ids[3])
    await record(services, event("other day", at=NOW - timedelta(days=1)), event("other type", kind="mb"))
    await record(services, event("other tenant", tenant="bolt"))
    await seal(services)
    (snapshot,) = [each for each in await snapshots(services) if (each.entry_count, each.tenant_id) == (10, "acme")]
    whole = await entries(services, snapshot.id)
    for limit in (1, 3, 10):
        assert await entries(services, snapshot.id, limit=limit) == whole
    leaves = [leaf_of(services.org_id, entry) for entry in whole]
    assert [entry.leaf for entry in whole] == [leaf.hex() for leaf in leaves]
    assert root_over(leaves) == snapshot.root
    assert {entry.snapshot_id for entry in whole} == {snapshot.id}
    assert [entry.event.timestamp_given for entry in whole if entry.HasField("event")].count(False) == 1
    (correction,) = [entry.correction for entry in whole if entry.HasField("correction")]
    assert (correction.event_id, correction.quantity_delta, correction.reason) == (ids[3], "-3.5", "sent by mistake")


async def test_metadata_is_shown_as_the_bytes_that_were_hashed(services: Services) -> None:
    sent = event("k")
    sent.metadata.update({"b": 1, "a": 'é"\n', "\U0001f600": [0.1, None]})
    await record(services, sent)
    await seal(services)
    (snapshot,) = await snapshots(services)
    (entry,) = await entries(services, snapshot.id)
    assert entry.event.metadata == '{"a":"é\\"\\n","b":1,"\U0001f600":[0.1,null]}'
    assert json.loads(entry.event.metadata)["b"] == 1
    assert leaf_of(services.org_id, entry).hex() == entry.leaf


@pytest.mark.parametrize("at", [datetime(1, 1, 2, tzinfo=UTC), datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC)])
async def test_entries_of_any_age_are_found(services: Services, at: datetime) -> None:
    await record(services, event("k", at=at))
    await seal(services)
    (snapshot,) = await snapshots(services)
    assert date.fromisoformat(snapshot.day) == at.date()
    (entry,) = await entries(services, snapshot.id)
    assert moment(entry.event.timestamp) == at
    assert leaf_of(services.org_id, entry) == snapshot.root


async def test_entries_of_many_snapshots_come_in_the_order_in_which_they_are_named(services: Services) -> None:
    for day in range(4):
        await record(services, *(event(f"{day}.{n}", at=NOW - timedelta(days=day)) for n in range(3)))
    await seal(services)
    ids = [each.id for each in await snapshots(services)][::-1]
    whole = [entry for snapshot_id in ids for entry in await entries(services, snapshot_id)]
    assert len(whole) == 12
    for start in range(12):
        for limit in (1, 4, 12):
            first = start // 3
            after = None
            if start % 3:
                after = ledger_pb2.EntryPlace(event_id=whole[start - 1].event.id)
            request = ledger_pb2.ReadEntriesRequest(
                org_id=str(services.org_id), snapshot_ids=ids[first:], after=after, limit=limit
            )
            answer = await ledger(services).ReadEntries(request, metadata=services.service_metadata, timeout=10)
            assert list(answer.entries) == whole[start : start + limit]


async def test_an_event_and_its_correction_are_proven_up_to_the_head(services: Services) -> None:
    ids = await record(services, *(event(f"k{number}") for number in range(9)))
    for number in range(5):
        await record(services, event(f"x{number}", tenant=f"tenant {number}"))
    await seal(services)
    await void(services, ids[4])
    await record(services, *(event(f"later{number}") for number in range(2)))
    await seal(services)
    head = await ledger(services).GetLedgerHead(ledger_pb2.GetLedgerHeadRequest(), metadata=services.metadata)
    for event_id in ids:
        request = proof_pb2.GetEventProofRequest(event_id=event_id)
        proof = await proofs(services).GetEventProof(request, metadata=services.metadata, timeout=10)
        assert proof.event.entry.event.id == event_id
        assert proof.org_id == str(services.org_id)
        assert proof.event.epoch.epoch == 1
        check_entry_proof(services.org_id, proof.event)
        assert proof.HasField("correction") == (event_id == ids[4])
    (corrected,) = [ids[4]]
    request = proof_pb2.GetEventProofRequest(event_id=corrected)
    proof = await proofs(services).GetEventProof(request, metadata=services.metadata, timeout=10)
    assert proof.correction.entry.correction.event_id == corrected
    check_entry_proof(services.org_id, proof.correction)
    assert (proof.correction.epoch.epoch, proof.correction.epoch.root) == (head.epoch, head.root) == (2, head.root)
    assert proof.correction.epoch.previous_root == proof.event.epoch.root


def check_entry_proof(org_id: UUID, proof: Any) -> None:
    snapshot, epoch = proof.snapshot, proof.epoch
    leaf = leaf_of(org_id, proof.entry)
    path = [bytes.fromhex(each) for each in proof.path]
    root = root_of_path(leaf, index=proof.index, size=snapshot.entry_count, path=path)
    assert root is not None and root.hex() == snapshot.root
    snapshot_leaf = ledger_format.snapshot_leaf(
        org_id=org_id,
        epoch=snapshot.epoch,
        tenant_id=snapshot.tenant_id,
        event_type=snapshot.event_type,
        day=date.fromisoformat(snapshot.day),
        entry_count=snapshot.entry_count,
        quantity=Decimal(snapshot.total),
        root=root,
    )
    path = [bytes.fromhex(each) for each in snapshot.path]
    tree = root_of_path(snapshot_leaf, index=snapshot.index, size=epoch.snapshot_count, path=path)
    assert tree is not None and tree.hex() == epoch.snapshots_root
    assert link(org_id, epoch).hex() == epoch.root


def link(org_id: UUID, epoch: Any) -> bytes:
    return ledger_format.epoch_root(
        org_id=org_id,
        epoch=epoch.epoch,
        previous_root=bytes.fromhex(epoch.previous_root),
        snapshots_root=bytes.fromhex(epoch.snapshots_root),
    )


async def test_an_event_is_not_proven_before_its_epoch_is_sealed(services: Services) -> None:
    (event_id,) = await record(services, event("k"))
    request = proof_pb2.GetEventProofRequest(event_id=event_id)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await proofs(services).GetEventProof(request, metadata=services.metadata, timeout=10)
    assert reason_of(caught.value) == "FAILED_PRECONDITION"
    await seal(services)
    await void(services, event_id)
    proof = await proofs(services).GetEventProof(request, metadata=services.metadata, timeout=10)
    assert not proof.HasField("correction")


async def test_the_chain_is_listed_from_any_epoch_and_ends_at_the_head(services: Services) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ledger(services).GetLedgerHead(ledger_pb2.GetLedgerHeadRequest(), metadata=services.metadata)
    assert reason_of(caught.value) == "NOT_FOUND"
    for number in range(5):
        await record(services, event(f"k{number}"))
        await seal(services)
    head = await ledger(services).GetLedgerHead(ledger_pb2.GetLedgerHeadRequest(), metadata=services.metadata)
    assert (head.org_id, head.epoch) == (str(services.org_id), 5)
    for after in range(6):
        found: list[Any] = []
        token: str | None = ""
        while token is not None:
            request = ledger_pb2.ListEpochsRequest(after_epoch=after, limit=2, page_token=token)
            page = await ledger(services).ListEpochs(request, metadata=services.metadata, timeout=10)
            found.extend(page.epochs)
            token = page.next_page_token if page.HasField("next_page_token") else None
        assert [epoch.epoch for epoch in found] == list(range(after + 1, 6))
        previous = "00" * 32 if after == 0 else None
        for epoch in found:
            assert previous in (None, epoch.previous_root)
            assert link(services.org_id, epoch).hex() == epoch.root
            previous = epoch.root
        assert previous in (None, head.root)


async def test_proofs_of_snapshots_end_early_rather_than_late(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        await record(services, *(event(f"{number}.{n}", tenant=f"tenant {n}") for n in range(3)))
        await seal(services)
    ids = [each.id for each in await snapshots(services)]
    request = proof_pb2.ProveSnapshotsRequest(org_id=str(services.org_id), snapshot_ids=ids)
    for leaves, answered in ((4_000_000, 12), (11, 9), (6, 6), (1, 3)):
        monkeypatch.setattr(proving, "LEAVES_A_CALL", leaves)
        answer = await proofs(services).ProveSnapshots(request, metadata=services.service_metadata, timeout=10)
        assert [each.id for each in answer.snapshots] == ids[:answered]


async def test_another_organization_sees_nothing_of_it(services: Services, database: Database) -> None:
    (event_id,) = await record(services, event("k"))
    await seal(services)
    (snapshot,) = await snapshots(services)
    _, key = await new_organization(database, "other")
    metadata = (("authorization", f"Bearer {key}"),)
    calls = [
        ledger(services).GetLedgerHead(ledger_pb2.GetLedgerHeadRequest(), metadata=metadata),
        ledger(services).ListSnapshotEvents(
            ledger_pb2.ListSnapshotEventsRequest(snapshot_id=snapshot.id), metadata=metadata
        ),
        proofs(services).GetEventProof(proof_pb2.GetEventProofRequest(event_id=event_id), metadata=metadata),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert reason_of(caught.value) == "NOT_FOUND"


async def test_the_entries_of_a_snapshot_are_read_by_an_index(services: Services, database: Database) -> None:
    """Whatever the organization has beside them: no plan scans the table."""
    from usameter_ingest.store import ledger as store

    await record(services, *(event(f"k{number}", tenant=f"tenant {number}") for number in range(50)))
    await seal(services)
    snapshot = (await snapshots(services))[0]
    connection = await asyncpg.connect(database.admin_url)
    try:
        await connection.execute("SET enable_seqscan = on; ANALYZE ingest.usage_event")
        await connection.execute(
            """
            INSERT INTO ingest.usage_event SELECT org_id, gen_random_uuid(), 'tenant ' || n % 50, event_type, quantity,
                occurred_at - n % 90 * interval '1 day', timestamp_given, ingested_at, epoch, metadata, NULL,
                request_hash, leaf_hash
            FROM (SELECT * FROM ingest.usage_event LIMIT 1) AS one, generate_series(1, 50000) AS n
            """
        )
        await connection.execute("ANALYZE")
        plan = await connection.fetchval(
            f"EXPLAIN (FORMAT JSON) SELECT count(*) FROM {store._SNAPSHOT_ENTRIES}",
            services.org_id,
            UUID(snapshot.id[4:]),
        )
    finally:
        await connection.close()
    assert "usage_event_tenant_time" in plan
    assert "Seq Scan" not in [
        node["Node Type"] for node in nodes(json.loads(plan)[0]["Plan"]) if node.get("Relation Name") == "usage_event"
    ]


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(found for child in plan.get("Plans", []) for found in nodes(child))]
