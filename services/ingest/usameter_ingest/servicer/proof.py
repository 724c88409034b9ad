"""ProofService: see usameter/ingest/v1/proof.proto."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc.aio

from usameter.ingest.v1 import proof_pb2, proof_pb2_grpc
from usameter_core.decimals import canonical
from usameter_core.grpc.context import current_principal
from usameter_core.ids import format_id, parse_id
from usameter_ingest.service.proving import EntryProof, ProvingService, SnapshotProof
from usameter_ingest.servicer.ledger import entry_to_proto, head_to_proto, ledger_epoch_to_proto
from usameter_ingest.servicer.snapshot import org_id_from_proto
from usameter_ingest.store.ledger import LedgerStore

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ProofServicer(proof_pb2_grpc.ProofServiceServicer):
    """Proves events to callers; snapshots and the chain to billing."""

    def __init__(self, *, proving: ProvingService, ledger: LedgerStore) -> None:
        self._proving = proving
        self._ledger = ledger

    async def GetEventProof(self, request: proof_pb2.GetEventProofRequest, context: Context) -> proof_pb2.EventProof:
        org_id = current_principal().org_id
        event, *correction = await self._proving.prove_event(
            org_id, parse_id("evt", request.event_id, field="event_id")
        )
        return proof_pb2.EventProof(
            org_id=str(org_id),
            event=entry_proof_to_proto(event),
            correction=entry_proof_to_proto(correction[0]) if correction else None,
        )

    async def ProveSnapshots(
        self, request: proof_pb2.ProveSnapshotsRequest, context: Context
    ) -> proof_pb2.ProveSnapshotsResponse:
        proofs = await self._proving.prove_snapshots(
            org_id_from_proto(request.org_id),
            [parse_id("snp", each, field="snapshot_ids") for each in request.snapshot_ids],
        )
        return proof_pb2.ProveSnapshotsResponse(
            snapshots=[snapshot_proof_to_proto(each, invoice_id=None) for each in proofs]
        )

    async def ReadChain(self, request: proof_pb2.ReadChainRequest, context: Context) -> proof_pb2.ReadChainResponse:
        org_id = org_id_from_proto(request.org_id)
        head = await self._ledger.find_head(org_id)
        if head is None:
            return proof_pb2.ReadChainResponse()
        # Not what was sealed since the head was read: the chain ends with it.
        last = request.last_epoch if request.HasField("last_epoch") else head.epoch
        epochs = await self._ledger.list_epochs(
            org_id, after=request.first_epoch - 1, through=last, limit=request.limit
        )
        return proof_pb2.ReadChainResponse(
            epochs=[ledger_epoch_to_proto(each) for each in epochs], head=head_to_proto(org_id, head)
        )


def entry_proof_to_proto(proof: EntryProof) -> proof_pb2.EntryProof:
    """An entry's way to the chain."""
    return proof_pb2.EntryProof(
        entry=entry_to_proto(proof.entry),
        index=proof.index,
        path=[each.hex() for each in proof.path],
        snapshot=snapshot_proof_to_proto(proof.snapshot, invoice_id=proof.snapshot.placed.invoice_id),
        epoch=ledger_epoch_to_proto(proof.epoch),
    )


def snapshot_proof_to_proto(proof: SnapshotProof, *, invoice_id: str | None) -> proof_pb2.SnapshotProof:
    """A snapshot's way to its epoch's tree."""
    snapshot = proof.placed.snapshot
    return proof_pb2.SnapshotProof(
        id=format_id("snp", snapshot.snapshot_id),
        epoch=snapshot.epoch,
        tenant_id=snapshot.tenant_id,
        event_type=snapshot.event_type,
        day=snapshot.day.isoformat(),
        entry_count=snapshot.entry_count,
        total=canonical(snapshot.quantity),
        root=snapshot.root.hex(),
        index=proof.placed.position,
        path=[each.hex() for each in proof.path],
        invoice_id=invoice_id,
    )
