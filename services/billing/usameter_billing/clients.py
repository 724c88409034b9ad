"""The services that billing calls, as it sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from uuid import UUID

import grpc.aio

from usameter.identity.v1 import organization_pb2, organization_pb2_grpc
from usameter.ingest.v1 import (
    ledger_pb2,
    ledger_pb2_grpc,
    proof_pb2,
    proof_pb2_grpc,
    snapshot_pb2,
    snapshot_pb2_grpc,
)
from usameter_billing.domain.invoice import Mark, Snapshot
from usameter_core.grpc.channels import service_metadata
from usameter_core.grpc.context import remaining_seconds
from usameter_core.grpc.status import peer_errors
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.ids import OrgId, format_id, parse_id

_CALL_SECONDS_MAX = 10.0
# Proofs read all leaves of an epoch.
_PROOF_SECONDS_MAX = 25.0
# What one call may carry (snapshot.proto).
_CALL_MARKS_MAX = 10_000
_PAGE_SNAPSHOTS = 5_000


@dataclass(frozen=True, slots=True)
class SnapshotPage:
    """A page of an organization's sealed snapshots, in ledger order.

    Attributes:
        snapshots: By epoch, ascending over all pages.
        through_epoch: The last sealed epoch when the page was made.
        is_last: Nothing came after it.
    """

    snapshots: Sequence[Snapshot]
    through_epoch: int
    is_last: bool


class IngestClient:
    """Calls to ingest, in the name of the deployment."""

    def __init__(self, channel: grpc.aio.Channel, *, internal_token: str) -> None:
        self._stub = snapshot_pb2_grpc.SnapshotServiceStub(channel)
        self._internal_token = internal_token

    async def snapshot_pages(self, org_id: OrgId, *, after_epoch: int) -> AsyncIterator[SnapshotPage]:
        """All sealed snapshots after an epoch, page by page; at least one page.

        Raises:
            Unavailable: Ingest cannot be reached. What was yielded stays true.
        """
        page_token = ""
        while True:
            with peer_errors("ingest"):
                answer = await self._stub.ListSnapshots(
                    snapshot_pb2.ListSnapshotsRequest(
                        org_id=str(org_id), after_epoch=after_epoch, limit=_PAGE_SNAPSHOTS, page_token=page_token
                    ),
                    metadata=service_metadata(self._internal_token),
                    timeout=remaining_seconds(at_most=_CALL_SECONDS_MAX),
                )
            page_token = answer.next_page_token
            snapshots = [_snapshot_from_proto(each) for each in answer.snapshots]
            yield SnapshotPage(snapshots, answer.through_epoch, is_last=not page_token)
            if not page_token:
                return

    async def mark_snapshots(self, org_id: OrgId, marks: Sequence[Mark]) -> None:
        """Tell which invoices cover which snapshots, in as many calls as it takes. Twice is harmless.

        Raises:
            Unavailable: Ingest cannot be reached; how much of it was heard is unknown.
        """
        messages = [message for mark in marks for message in _messages_of(mark)]
        for start in range(0, len(messages), _CALL_MARKS_MAX):
            with peer_errors("ingest"):
                await self._stub.MarkSnapshots(
                    snapshot_pb2.MarkSnapshotsRequest(
                        org_id=str(org_id), marks=messages[start : start + _CALL_MARKS_MAX]
                    ),
                    metadata=service_metadata(self._internal_token),
                    timeout=remaining_seconds(at_most=_CALL_SECONDS_MAX),
                )


class OrganizationClient:
    """What identity says of organizations."""

    def __init__(self, channel: grpc.aio.Channel, *, internal_token: str) -> None:
        self._stub = organization_pb2_grpc.OrganizationServiceStub(channel)
        self._internal_token = internal_token

    async def read_name(self, org_id: OrgId) -> str:
        """The organization's name as it is now.

        Raises:
            Unavailable: Identity cannot be reached.
        """
        with peer_errors("identity"):
            answer = await self._stub.ReadOrganization(
                organization_pb2.ReadOrganizationRequest(org_id=str(org_id)),
                metadata=service_metadata(self._internal_token),
                timeout=remaining_seconds(at_most=_CALL_SECONDS_MAX),
            )
        return answer.name


# An event, and whether it is its correction that is meant.
EntryPlace = tuple[UUID, bool]


class LedgerClient:
    """What ingest says of the sealed ledger, in its own words: billing hands them on.

    All calls raise `Unavailable` where ingest cannot be reached, and `NotFound` for a snapshot that it lacks.
    """

    def __init__(self, channel: grpc.aio.Channel, *, internal_token: str) -> None:
        self._ledger = ledger_pb2_grpc.LedgerServiceStub(channel)
        self._proofs = proof_pb2_grpc.ProofServiceStub(channel)
        self._internal_token = internal_token

    async def read_entries(
        self, org_id: OrgId, snapshot_ids: Sequence[UUID], *, after: EntryPlace | None, limit: int
    ) -> ledger_pb2.ReadEntriesResponse:
        """Up to `limit` entries of at most 1,000 snapshots, in order; of the first those behind `after`.

        `ends_early` says that there are more, for which one answer has no room.
        """
        place = None
        if after is not None:
            place = ledger_pb2.EntryPlace(event_id=format_id("evt", after[0]), correction=after[1])
        request = ledger_pb2.ReadEntriesRequest(
            org_id=str(org_id), snapshot_ids=_snapshot_ids(snapshot_ids), after=place, limit=limit
        )
        with peer_errors("ingest"):
            return await self._ledger.ReadEntries(
                request,
                metadata=service_metadata(self._internal_token),
                timeout=remaining_seconds(at_most=_PROOF_SECONDS_MAX),
            )

    async def prove_snapshots(self, org_id: OrgId, snapshot_ids: Sequence[UUID]) -> Sequence[proof_pb2.SnapshotProof]:
        """The proofs of at most 1,000 snapshots, in the order named; of the first where all would take too long."""
        request = proof_pb2.ProveSnapshotsRequest(org_id=str(org_id), snapshot_ids=_snapshot_ids(snapshot_ids))
        with peer_errors("ingest"):
            answer = await self._proofs.ProveSnapshots(
                request,
                metadata=service_metadata(self._internal_token),
                timeout=remaining_seconds(at_most=_PROOF_SECONDS_MAX),
            )
        return answer.snapshots

    async def read_chain(
        self, org_id: OrgId, *, first_epoch: int, last_epoch: int | None, limit: int
    ) -> proof_pb2.ReadChainResponse:
        """Up to `limit` epochs of the chain from one to another (None: to the end), and its end."""
        request = proof_pb2.ReadChainRequest(
            org_id=str(org_id), first_epoch=first_epoch, last_epoch=last_epoch, limit=limit
        )
        with peer_errors("ingest"):
            return await self._proofs.ReadChain(
                request,
                metadata=service_metadata(self._internal_token),
                timeout=remaining_seconds(at_most=_CALL_SECONDS_MAX),
            )


def _snapshot_ids(snapshot_ids: Sequence[UUID]) -> list[str]:
    return [format_id("snp", each) for each in snapshot_ids]


def _messages_of(mark: Mark) -> Iterator[snapshot_pb2.SnapshotMark]:
    # An invoice has hundreds of snapshots, which differ in their ids only.
    invoice_id = None if mark.billed_at is None else format_id("inv", mark.invoice_id)
    billed_at = None if mark.billed_at is None else timestamp_from_datetime(mark.billed_at)
    for snapshot_id in mark.snapshot_ids:
        yield snapshot_pb2.SnapshotMark(
            snapshot_id=format_id("snp", snapshot_id),
            invoice_id=invoice_id,
            billed_at=billed_at,
            version=mark.version,
        )


def _snapshot_from_proto(message: snapshot_pb2.Snapshot) -> Snapshot:
    return Snapshot(
        snapshot_id=parse_id("snp", message.id, field="snapshots.id"),
        epoch=message.epoch,
        tenant_id=message.tenant_id,
        event_type=message.event_type,
        day=date.fromisoformat(message.day),
        entry_count=message.entry_count,
        total=Decimal(message.total),
        root=message.root,
    )
