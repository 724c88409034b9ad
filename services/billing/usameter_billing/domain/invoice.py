"""Invoices and their lines, as values.

A `DueLine` is what was computed; an `InvoiceLine` is one that is stored and has an id.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

from usameter_billing.domain.plan import Plan
from usameter_core.decimals import CONTEXT, exact_sum
from usameter_core.ids import OrgId
from usameter_core.period import Period
from usameter_proof.pricing import PriceVersion
from usameter_proof.rating import tax_amount


class InvoiceStatus(StrEnum):
    """The names are those of usameter/billing/v1/invoice.proto."""

    DRAFT = "draft"
    OPEN = "open"
    PAID = "paid"
    VOID = "void"
    UNCOLLECTIBLE = "uncollectible"


class LineKind(StrEnum):
    """USAGE and BASE_FEE are the first of their subject; TRUE_UP is any difference, and use of earlier periods."""

    USAGE = "USAGE"
    TRUE_UP = "TRUE_UP"
    BASE_FEE = "BASE_FEE"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A sealed snapshot, as ingest stated it."""

    snapshot_id: UUID
    epoch: int
    tenant_id: str
    event_type: str
    day: date
    entry_count: int
    total: Decimal
    root: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """A finalized invoice and the snapshots it covers; a snapshot's marks are ordered by `version`.

    `billed_at` is None where the invoice is void: it covers them no longer.
    """

    org_id: OrgId
    invoice_id: UUID
    version: int
    billed_at: datetime | None
    snapshot_ids: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class BilledLine:
    """A finalized line that counts as billed for its subject and period."""

    invoice_id: UUID
    line_id: UUID
    amount: Decimal


@dataclass(frozen=True, slots=True)
class UseCharge:
    """The use of an event type: `quantity` is that of the whole period."""

    event_type: str
    price: PriceVersion
    quantity: Decimal

    @property
    def currency(self) -> str:
        """That of its price."""
        return self.price.price.currency


@dataclass(frozen=True, slots=True)
class FeeCharge:
    """A plan's base fee: `seconds` of the interval are on the plan."""

    subscription_id: UUID
    plan: Plan
    seconds: int

    @property
    def currency(self) -> str:
        """That of its plan."""
        return self.plan.currency


@dataclass(frozen=True, slots=True)
class DueLine:
    """What one subject, use or a base fee, still owes: `amount` = `rated_amount` − what was billed.

    Attributes:
        period: The billing period of the use, or the interval of the base fee.
        tax_rate: Percent.
        snapshot_ids: Of the use, only those that no invoice covers yet.
    """

    kind: LineKind
    period: Period
    charge: UseCharge | FeeCharge
    tax_rate: Decimal
    rated_amount: Decimal
    amount: Decimal
    previously_billed: tuple[BilledLine, ...]
    snapshot_ids: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class DueInvoice:
    """All lines of a tenant in one currency, on the invoice of `period`; never without lines."""

    tenant_id: str
    period: Period
    currency: str
    lines: tuple[DueLine, ...]
    unpriced_event_types: tuple[str, ...]

    @property
    def subtotal(self) -> Decimal:
        """The sum of the rounded lines."""
        return exact_sum(line.amount for line in self.lines)

    @property
    def tax(self) -> Decimal:
        """The sum of each rate's tax, which is rounded once on all lines of the rate."""
        sums: dict[Decimal, Decimal] = {}
        for line in self.lines:
            sums[line.tax_rate] = CONTEXT.add(sums.get(line.tax_rate, Decimal(0)), line.amount)
        return exact_sum(tax_amount(amount, rate, self.currency) for rate, amount in sums.items())

    @property
    def total(self) -> Decimal:
        """Lines and tax (I7)."""
        return CONTEXT.add(self.subtotal, self.tax)


@dataclass(frozen=True, slots=True)
class Parties:
    """Who sells and who is billed, as documents print it; the address has lines, and may be empty."""

    seller_name: str
    bill_to_address: str


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """A stored line, with the snapshots that it is the first to cover."""

    line_id: UUID
    due: DueLine
    snapshots: tuple[Snapshot, ...]


@dataclass(frozen=True, slots=True)
class Invoice:
    """A stored invoice. A draft has no number, and neither an issue nor a due date.

    Attributes:
        parties: As they were when it was finalized; None in a draft.
        amount_due: Still to be paid; more than 0 while it is open or uncollectible, and only then.
        overdue: It is open, and its due date has come.
    """

    invoice_id: UUID
    number: int | None
    tenant_id: str
    status: InvoiceStatus
    currency: str
    period: Period
    through_epoch: int
    subtotal: Decimal
    tax: Decimal
    total: Decimal
    amount_due: Decimal
    amount_paid: Decimal
    overdue: bool
    issued_at: datetime | None
    due_at: datetime | None
    parties: Parties | None
    paid_at: datetime | None
    payment_reference: str | None
    voided_at: datetime | None
    void_reason: str | None
    uncollectible_at: datetime | None
    uncollectible_reason: str | None
    unpriced_event_types: tuple[str, ...]
    # Not loaded in lists.
    lines: tuple[InvoiceLine, ...] = ()
