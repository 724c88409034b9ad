"""Trail and proof of an invoice with more behind it than one call or page carries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import Organization, StandInLedger, World, open_world
from tests.support.services import reason_of
from usameter.billing.v1 import proof_pb2, proof_pb2_grpc
from usameter.ingest.v1 import ledger_pb2, ledger_pb2_grpc, snapshot_pb2_grpc
from usameter.ingest.v1 import proof_pb2 as ledger_proof_pb2
from usameter.ingest.v1 import proof_pb2_grpc as ledger_proof_pb2_grpc
from usameter_core.config import Address

EPOCHS = 5_300


class StandInSealed(ledger_pb2_grpc.LedgerServiceServicer, ledger_proof_pb2_grpc.ProofServiceServicer):
    """Two entries behind each snapshot of the stand-in for ingest: an event and its correction.

    Of entries with `metadata` it answers with at most `entries_max`, as where more would be too large.
    """

    def __init__(self, ledger: StandInLedger, *, metadata: str, entries_max: int) -> None:
        self._ledger = ledger
        self._metadata = metadata
        self._entries_max = entries_max

    def _epochs(self, org_id: str) -> list[ledger_pb2.LedgerEpoch]:
        return [ledger_pb2.LedgerEpoch(epoch=number + 1) for number in range(len(self._ledger.epochs.get(org_id, [])))]

    async def ReadEntries(self, request: Any, context: Any) -> ledger_pb2.ReadEntriesResponse:
        entries = []
        for number, snapshot_id in enumerate(request.snapshot_ids):
            event_id = "evt_" + snapshot_id[4:]
            after = request.after if number == 0 and request.HasField("after") else None
            if after is not None:
                assert after.event_id == event_id
            if after is None:
                event = ledger_pb2.EventEntry(id=event_id, metadata=self._metadata)
                entries.append(ledger_pb2.LedgerEntry(snapshot_id=snapshot_id, event=event))
            if after is None or not after.correction:
                correction = ledger_pb2.CorrectionEntry(event_id=event_id)
                entries.append(ledger_pb2.LedgerEntry(snapshot_id=snapshot_id, correction=correction))
        asked = entries[: request.limit]
        answered = asked[: self._entries_max]
        return ledger_pb2.ReadEntriesResponse(entries=answered, ends_early=len(answered) < len(asked))

    async def ProveSnapshots(self, request: Any, context: Any) -> ledger_proof_pb2.ProveSnapshotsResponse:
        # Fewer than are asked for, as where epochs are large.
        snapshots = [ledger_proof_pb2.SnapshotProof(id=each) for each in request.snapshot_ids[:900]]
        return ledger_proof_pb2.ProveSnapshotsResponse(snapshots=snapshots)

    async def ReadChain(self, request: Any, context: Any) -> ledger_proof_pb2.ReadChainResponse:
        epochs = self._epochs(request.org_id)
        last = request.last_epoch if request.HasField("last_epoch") else len(epochs)
        return ledger_proof_pb2.ReadChainResponse(
            epochs=epochs[request.first_epoch - 1 : last][: request.limit],
            head=ledger_pb2.LedgerHead(org_id=request.org_id, epoch=len(epochs)),
        )


@asynccontextmanager
async def sealed_world(database: Database, *, metadata: str = "{}", entries_max: int = 10_000) -> AsyncIterator[World]:
    """The stand-ins of `open_world`, with one for the sealed ledger beside them."""
    async with open_world(database, page_snapshots=None) as world:
        server = grpc.aio.server()
        sealed = StandInSealed(world.ledger, metadata=metadata, entries_max=entries_max)
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(sealed, server)
        ledger_proof_pb2_grpc.add_ProofServiceServicer_to_server(sealed, server)
        snapshot_pb2_grpc.add_SnapshotServiceServicer_to_server(world.ledger, server)
        world.identity.add_to(server)
        world.peers = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        yield world
        await server.stop(None)


async def proof_pages(org: Organization, invoice_id: str, limit: int) -> list[proof_pb2.InvoiceProof]:
    stub = proof_pb2_grpc.InvoiceProofServiceStub(org.channel)
    pages: list[proof_pb2.InvoiceProof] = []
    while not pages or pages[-1].HasField("next_page_token"):
        token = pages[-1].next_page_token if pages else ""
        request = proof_pb2.GetInvoiceProofRequest(invoice_id=invoice_id, limit=limit, page_token=token)
        pages.append(await stub.GetInvoiceProof(request, metadata=org.metadata))
        assert len(pages[-1].snapshots) <= limit and len(pages[-1].epochs) <= 5_000
        # What is sealed meanwhile is in none of the pages.
        org.seal(("somebody else", "call", "2026-01-02", "1"))
    return pages


async def entry_pages(org: Organization, invoice_id: str, limit: int) -> list[ledger_pb2.LedgerEntry]:
    stub = proof_pb2_grpc.InvoiceProofServiceStub(org.channel)
    entries: list[ledger_pb2.LedgerEntry] = []
    token: str | None = ""
    while token is not None:
        request = proof_pb2.ListInvoiceEventsRequest(invoice_id=invoice_id, limit=limit, page_token=token)
        page = await stub.ListInvoiceEvents(request, metadata=org.metadata)
        assert len(page.events) == limit or not page.HasField("next_page_token")
        entries += page.events
        token = page.next_page_token if page.HasField("next_page_token") else None
    return entries


async def test_thousands_of_snapshots_and_epochs_come_page_by_page(database: Database) -> None:
    async with sealed_world(database) as world, world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", "0.02")
        org.seal(("somebody else", "call", "2026-01-01", "1"))
        sealed = [org.seal(("acme", "call", f"2026-01-{n % 31 + 1:02}", "2"))[0] for n in range(EPOCHS)]
        # Neither of another type, of another month, nor after the invoice.
        org.seal(("acme", "unpriced", "2026-01-01", "1"), ("acme", "call", "2026-02-01", "1"))
        invoice = await org.bill("acme")
        org.seal(("acme", "call", "2026-01-01", "1"))
        head = len(world.ledger.epochs[str(org.org_id)])
        pages = await proof_pages(org, invoice.id, 1_000)
        assert [each.id for page in pages for each in page.snapshots] == sealed
        assert {each.invoice_id for page in pages for each in page.snapshots} == {invoice.id}
        assert [each.epoch for page in pages for each in page.epochs] == list(range(2, head + 1))
        assert pages[0].invoice == invoice and pages[0].head.epoch == head
        assert not any(page.HasField("invoice") or page.HasField("head") for page in pages[1:])
        entries = await entry_pages(org, invoice.id, 997)
        assert [each.snapshot_id for each in entries[::2]] == sealed == [each.snapshot_id for each in entries[1::2]]
        assert all(each.HasField("event") for each in entries[::2])
        assert all(each.HasField("correction") for each in entries[1::2])


@pytest.mark.parametrize("entries_max", [7, 8, 10_000])
async def test_pages_of_entries_end_before_they_grow_too_large(database: Database, entries_max: int) -> None:
    async with (
        sealed_world(database, metadata="x" * 500_000, entries_max=entries_max) as world,
        world.open_service() as channel,
    ):
        org = world.organization(channel)
        await org.set_price("call", "0.02")
        sealed = [org.seal(("acme", "call", f"2026-01-{day:02}", "2"))[0] for day in range(1, 16)]
        invoice = await org.bill("acme")
        stub: Any = proof_pb2_grpc.InvoiceProofServiceStub(org.channel)
        pages: list[proof_pb2.ListInvoiceEventsResponse] = []
        while not pages or pages[-1].HasField("next_page_token"):
            token = pages[-1].next_page_token if pages else ""
            request = proof_pb2.ListInvoiceEventsRequest(invoice_id=invoice.id, limit=1000, page_token=token)
            pages.append(await stub.ListInvoiceEvents(request, metadata=org.metadata))
        assert all(0 < page.ByteSize() < 4 * 1024 * 1024 for page in pages)
        entries = [entry for page in pages for entry in page.events]
        assert [each.snapshot_id for each in entries[::2]] == sealed == [each.snapshot_id for each in entries[1::2]]
        assert all(each.HasField("event") for each in entries[::2])


async def test_a_draft_has_no_proof_and_what_is_not_there_neither(database: Database) -> None:
    async with sealed_world(database) as world, world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", "0.02")
        org.seal(("acme", "call", "2026-01-10", "100"))
        draft = await org.draft("acme")
        for invoice_id, reason in ((draft.id, "FAILED_PRECONDITION"), ("inv_" + "0" * 32, "NOT_FOUND")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await proof_pages(org, invoice_id, 10)
            assert reason_of(caught.value) == reason
        assert len(await entry_pages(org, draft.id, 10)) == 2
        other = world.organization(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await entry_pages(other, draft.id, 10)
        assert reason_of(caught.value) == "NOT_FOUND"


async def test_an_invoice_without_use_states_the_head_and_needs_no_chain(database: Database) -> None:
    async with sealed_world(database) as world, world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", "0.02")
        org.seal(("acme", "call", "2026-01-10", "100"))
        invoice = await org.bill("acme")
        await world.admin.execute("UPDATE billing.invoice_line SET event_type = 'gone'")
        (page,) = await proof_pages(org, invoice.id, 10)
        assert (list(page.snapshots), list(page.epochs), page.head.epoch) == ([], [], 1)
        assert await entry_pages(org, invoice.id, 10) == []
