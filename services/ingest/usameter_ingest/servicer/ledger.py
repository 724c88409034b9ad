"""LedgerService: see usameter/ingest/v1/ledger.proto."""

from __future__ import annotations

from typing import Any, TypeAlias
from uuid import UUID

import grpc.aio

from usameter.ingest.v1 import event_pb2, ledger_pb2, ledger_pb2_grpc
from usameter_core.decimals import canonical
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.pages import fill_page
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.ids import OrgId, format_id, parse_id
from usameter_core.pages import DEFAULT_LIMIT, decode_page_token, encode_page_token
from usameter_ingest.service.proving import ProvingService
from usameter_ingest.service.trail import TrailService
from usameter_ingest.servicer.snapshot import org_id_from_proto
from usameter_ingest.store.ledger import (
    CorrectionContent,
    EventContent,
    LedgerEntry,
    LedgerEpoch,
    LedgerStore,
)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class LedgerServicer(ledger_pb2_grpc.LedgerServiceServicer):
    """Shows the chain, and the entries behind snapshots."""

    def __init__(self, *, trail: TrailService, proving: ProvingService, ledger: LedgerStore) -> None:
        self._trail = trail
        self._proving = proving
        self._ledger = ledger

    async def GetLedgerHead(self, request: ledger_pb2.GetLedgerHeadRequest, context: Context) -> ledger_pb2.LedgerHead:
        org_id = current_principal().org_id
        return head_to_proto(org_id, await self._proving.head(org_id))

    async def ListEpochs(
        self, request: ledger_pb2.ListEpochsRequest, context: Context
    ) -> ledger_pb2.ListEpochsResponse:
        limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
        (after,) = decode_page_token(request.page_token, tuple[int]) or (request.after_epoch,)
        epochs = await self._ledger.list_epochs(current_principal().org_id, after=after, through=None, limit=limit + 1)
        page = epochs[:limit]
        return ledger_pb2.ListEpochsResponse(
            epochs=[ledger_epoch_to_proto(each) for each in page],
            next_page_token=encode_page_token([page[-1].epoch]) if len(epochs) > limit else None,
        )

    async def ListSnapshotEvents(
        self, request: ledger_pb2.ListSnapshotEventsRequest, context: Context
    ) -> ledger_pb2.ListSnapshotEventsResponse:
        limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
        found = await self._trail.read(
            current_principal().org_id,
            [parse_id("snp", request.snapshot_id, field="snapshot_id")],
            after=decode_page_token(request.page_token, tuple[UUID, bool]),
            limit=limit + 1,
        )
        entries, goes_on = fill_page(found, limit=limit, to_proto=entry_to_proto)
        token = entry_page_token(found[len(entries) - 1]) if goes_on else None
        return ledger_pb2.ListSnapshotEventsResponse(events=entries, next_page_token=token)

    async def ReadEntries(
        self, request: ledger_pb2.ReadEntriesRequest, context: Context
    ) -> ledger_pb2.ReadEntriesResponse:
        after = None
        if request.HasField("after"):
            after = parse_id("evt", request.after.event_id, field="after.event_id"), request.after.correction
        found = await self._trail.read(
            org_id_from_proto(request.org_id),
            [parse_id("snp", each, field="snapshot_ids") for each in request.snapshot_ids],
            after=after,
            limit=request.limit,
        )
        entries, ends_early = fill_page(found, limit=request.limit, to_proto=entry_to_proto)
        return ledger_pb2.ReadEntriesResponse(entries=entries, ends_early=ends_early)


def head_to_proto(org_id: OrgId, head: LedgerEpoch) -> ledger_pb2.LedgerHead:
    """The end of an organization's chain."""
    return ledger_pb2.LedgerHead(
        org_id=str(org_id),
        epoch=head.epoch,
        root=head.root.hex(),
        sealed_at=timestamp_from_datetime(head.sealed_at),
    )


def ledger_epoch_to_proto(epoch: LedgerEpoch) -> ledger_pb2.LedgerEpoch:
    """A link of the chain."""
    return ledger_pb2.LedgerEpoch(
        epoch=epoch.epoch,
        entry_count=epoch.entry_count,
        snapshot_count=epoch.snapshot_count,
        snapshots_root=epoch.snapshots_root.hex(),
        previous_root=epoch.previous_root.hex(),
        root=epoch.root.hex(),
        sealed_at=timestamp_from_datetime(epoch.sealed_at),
    )


def entry_page_token(last: LedgerEntry) -> str:
    """Where the list of a snapshot goes on behind an entry."""
    event_id, is_correction = last.place
    return encode_page_token([str(event_id), is_correction])


def entry_to_proto(entry: LedgerEntry) -> ledger_pb2.LedgerEntry:
    """An entry with everything that its leaf covers."""
    message = ledger_pb2.LedgerEntry(
        snapshot_id=format_id("snp", entry.snapshot_id),
        epoch=entry.epoch,
        ingested_at=timestamp_from_datetime(entry.ingested_at),
        leaf=entry.leaf_hash.hex(),
    )
    match entry.content:
        case EventContent() as event:
            message.event.CopyFrom(
                ledger_pb2.EventEntry(
                    id=format_id("evt", entry.event_id),
                    tenant_id=entry.tenant_id,
                    event_type=entry.event_type,
                    quantity_decimal=canonical(entry.quantity),
                    metadata=event.metadata,
                    timestamp=timestamp_from_datetime(entry.occurred_at),
                    timestamp_given=event.timestamp_given,
                    idempotency_key=event.idempotency_key,
                )
            )
        case CorrectionContent() as correction:
            message.correction.CopyFrom(
                ledger_pb2.CorrectionEntry(
                    event_id=format_id("evt", entry.event_id),
                    tenant_id=entry.tenant_id,
                    event_type=entry.event_type,
                    kind=event_pb2.CorrectionKind.Value(correction.kind),
                    quantity_delta=canonical(entry.quantity),
                    reason=correction.reason,
                    timestamp=timestamp_from_datetime(entry.occurred_at),
                )
            )
    return message
