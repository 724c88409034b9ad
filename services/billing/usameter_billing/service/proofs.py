"""From an invoice to its entries, and to the proof that they are in the ledger, page by page.

Billing knows which snapshots a line was made of; what is in them and where they are in the ledger is ingest's
to say, and is handed on as it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING
from uuid import UUID

from usameter.ingest.v1 import ledger_pb2, proof_pb2
from usameter_billing.clients import EntryPlace, LedgerClient
from usameter_billing.domain.invoice import Invoice, InvoiceStatus
from usameter_billing.service.invoices import Invoices
from usameter_billing.store import proofs
from usameter_billing.store.proofs import SnapshotKey, UsedSnapshot
from usameter_core.errors import FailedPrecondition
from usameter_core.grpc.pages import fill_page
from usameter_core.ids import OrgId, format_id
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_core.postgres.transaction import run_transaction

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Pool

# What one call to ingest may name (ledger.proto, proof.proto).
_CALL_SNAPSHOTS_MAX = 1_000
# 1.7 MB of JSON.
_PAGE_EPOCHS = 5_000


@dataclass(frozen=True, slots=True)
class EntryPage:
    """Some entries, and the token of those after them; None on the last page."""

    entries: Sequence[ledger_pb2.LedgerEntry]
    next_page_token: str | None


@dataclass(frozen=True, slots=True)
class ProofPage:
    """A part of an invoice's proof.

    Attributes:
        invoice: On the first page.
        head: On the first page, where an epoch is sealed.
        snapshots: With the ids of the invoices that cover them.
        epochs: Of the chain.
    """

    invoice: Invoice | None
    head: ledger_pb2.LedgerHead | None
    snapshots: Sequence[tuple[proof_pb2.SnapshotProof, UUID | None]]
    epochs: Sequence[ledger_pb2.LedgerEpoch]
    next_page_token: str | None


class InvoiceProofs:
    """The trail and the proof of invoices."""

    def __init__(self, *, pool: Pool, invoices: Invoices, ledger: LedgerClient) -> None:
        self._pool = pool
        self._invoices = invoices
        self._ledger = ledger

    async def list_entries(self, org_id: OrgId, invoice_id: UUID, *, limit: int, page_token: str) -> EntryPage:
        """A page of the entries behind a draft or an invoice, by snapshot and leaf.

        Raises:
            NotFound: There is no such invoice.
            Unavailable: Ingest or the database cannot be reached; a retry is safe.
        """
        token = decode_page_token(page_token, tuple[int, str, date, UUID, bool])
        start: SnapshotKey | None = token[:3] if token else None
        after: EntryPlace | None = token[3:] if token else None
        if token is None:
            # An invoice without use has no entries; one that is not there is another matter.
            await self._invoices.get(org_id, invoice_id)
        entries: list[ledger_pb2.LedgerEntry] = []
        keys: dict[str, SnapshotKey] = {}
        ends_early = False
        while len(entries) <= limit and not ends_early:
            used = await self._used(org_id, invoice_id, start, _CALL_SNAPSHOTS_MAX + 1)
            batch, rest = used[:_CALL_SNAPSHOTS_MAX], used[_CALL_SNAPSHOTS_MAX:]
            if batch:
                keys |= {format_id("snp", each.snapshot_id): each.key for each in batch}
                ids = [each.snapshot_id for each in batch]
                answer = await self._ledger.read_entries(org_id, ids, after=after, limit=limit + 1 - len(entries))
                entries += answer.entries
                ends_early = answer.ends_early
            if not rest:
                break
            start, after = rest[0].key, None
        page, goes_on = fill_page(entries, limit=limit, to_proto=lambda entry: entry)
        if not goes_on and not ends_early:
            return EntryPage(page, None)
        return EntryPage(page, _entry_token(keys[page[-1].snapshot_id], page[-1]))

    async def prove(self, org_id: OrgId, invoice_id: UUID, *, limit: int, page_token: str) -> ProofPage:
        """A page of the proof: up to `limit` snapshots, fewer where their epochs are large, and 5,000 epochs.

        Raises:
            NotFound: There is no such invoice.
            FailedPrecondition: NOT_FINALIZED: a draft proves nothing.
            Unavailable: Ingest or the database cannot be reached; a retry is safe.
        """
        token = decode_page_token(page_token, tuple[int, str, date, int, int])
        if token is None:
            invoice = await self._finalized(org_id, invoice_id)
            used = await self._used(org_id, invoice_id, None, limit + 1)
            # From the first epoch that is used to the end. Without use nothing of the chain is needed.
            first_epoch, last_epoch = (used[0].key[0], None) if used else (1, 0)
        else:
            invoice = None
            used = await self._used(org_id, invoice_id, token[:3], limit + 1)
            first_epoch, last_epoch = token[3:]
        chain = await self._ledger.read_chain(
            org_id, first_epoch=first_epoch, last_epoch=last_epoch, limit=_PAGE_EPOCHS
        )
        # Later pages end where the first one said, whatever is sealed meanwhile.
        last_epoch = chain.head.epoch if last_epoch is None else last_epoch
        next_epoch = chain.epochs[-1].epoch + 1 if chain.epochs else first_epoch
        proven = await self._prove_snapshots(org_id, used[:limit])
        return ProofPage(
            invoice,
            chain.head if invoice and chain.HasField("head") else None,
            proven,
            chain.epochs,
            _proof_token(used[len(proven) :], next_epoch=next_epoch, last_epoch=last_epoch),
        )

    async def _finalized(self, org_id: OrgId, invoice_id: UUID) -> Invoice:
        invoice = await self._invoices.get(org_id, invoice_id)
        if invoice.status is InvoiceStatus.DRAFT:
            raise FailedPrecondition("NOT_FINALIZED", f"{format_id('inv', invoice_id)} is a draft; finalize it first")
        return invoice

    async def _prove_snapshots(
        self, org_id: OrgId, used: Sequence[UsedSnapshot]
    ) -> list[tuple[proof_pb2.SnapshotProof, UUID | None]]:
        if not used:
            return []
        proven = await self._ledger.prove_snapshots(org_id, [each.snapshot_id for each in used])
        # Not strict: ingest may have stopped before the last of them.
        return [(proof, each.invoice_id) for proof, each in zip(proven, used, strict=False)]

    async def _used(self, org_id: OrgId, invoice_id: UUID, start: SnapshotKey | None, limit: int) -> list[UsedSnapshot]:
        return await run_transaction(
            self._pool,
            lambda connection: proofs.list_used_snapshots(connection, org_id, invoice_id, start=start, limit=limit),
        )


def _entry_token(key: SnapshotKey, entry: ledger_pb2.LedgerEntry) -> str:
    is_correction = entry.HasField("correction")
    event_id = entry.correction.event_id if is_correction else entry.event.id
    epoch, event_type, day = key
    return encode_page_token([epoch, event_type, day.isoformat(), event_id.removeprefix("evt_"), is_correction])


def _proof_token(rest: Sequence[UsedSnapshot], *, next_epoch: int, last_epoch: int) -> str | None:
    if not rest and next_epoch > last_epoch:
        return None
    # Behind the last epoch there are no snapshots.
    epoch, event_type, day = rest[0].key if rest else (last_epoch + 1, "", date.min)
    return encode_page_token([epoch, event_type, day.isoformat(), next_epoch, last_epoch])
