"""What a document says beside the invoice: who sells, whom it is for, and the root that proves it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from usameter_billing.clients import LedgerClient, OrganizationClient
from usameter_billing.domain.invoice import Invoice, Parties
from usameter_billing.service.invoices import Invoices
from usameter_billing.service.settings import Settings
from usameter_core.ids import OrgId


@dataclass(frozen=True, slots=True)
class PrintedInvoice:
    """An invoice with what is printed around it.

    Attributes:
        parties: As they were frozen with the invoice; of a draft, as they are now.
        root: Of the chain at the invoice's through_epoch, 64 hex digits; None where nothing was sealed.
    """

    invoice: Invoice
    parties: Parties
    root: str | None


class InvoiceDocuments:
    """Gathers what documents of invoices say."""

    def __init__(
        self, *, invoices: Invoices, settings: Settings, organizations: OrganizationClient, ledger: LedgerClient
    ) -> None:
        self._invoices = invoices
        self._settings = settings
        self._organizations = organizations
        self._ledger = ledger

    async def gather(self, org_id: OrgId, invoice_id: UUID) -> PrintedInvoice:
        """The invoice as it stands, with its surroundings.

        Raises:
            NotFound: There is no such invoice.
            Unavailable: Ingest, for a draft identity, or the database cannot be reached; a retry is safe.
        """
        invoice = await self._invoices.get(org_id, invoice_id)
        parties = invoice.parties or await self._parties_now(org_id, invoice.tenant_id)
        return PrintedInvoice(invoice, parties, await self._root(org_id, invoice.through_epoch))

    async def _parties_now(self, org_id: OrgId, tenant_id: str) -> Parties:
        settings = await self._settings.get(org_id, tenant_id)
        return Parties(await self._organizations.read_name(org_id), settings.address)

    async def _root(self, org_id: OrgId, epoch: int) -> str | None:
        if epoch == 0:
            return None
        chain = await self._ledger.read_chain(org_id, first_epoch=epoch, last_epoch=epoch, limit=1)
        return chain.epochs[0].root
