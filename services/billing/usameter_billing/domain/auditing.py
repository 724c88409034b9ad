"""What an audit of the invoices has compared, where it goes on, and what it compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

from usameter_core.audit import Violation
from usameter_core.period import Period


class Stage(StrEnum):
    """What is compared, in this order.

    LEDGER: the copy of the snapshots with those of ingest. TENANTS: what is covered and billed of each with its use,
    and its credit. INVOICES: totals and numbers with lines, lines with what they are made of, and what became of them.
    """

    LEDGER = "ledger"
    TENANTS = "tenants"
    INVOICES = "invoices"


@dataclass(frozen=True, slots=True)
class AuditPlace:
    """Where a page of the audit begins: behind this epoch, tenant or number, as the stage has it."""

    stage: Stage = Stage.LEDGER
    epoch: int = 0
    tenant_id: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class Audited:
    """What a page came to; `next_place` is None once everything is compared."""

    checked: int
    violations: Sequence[Violation]
    next_place: AuditPlace | None


@dataclass(frozen=True, slots=True)
class BilledUse:
    """The use of one event type in one billing period, and what was billed of it.

    Attributes:
        quantity: Of all its snapshots.
        is_covered: All of them are, and nothing that the last line had counted as billed was voided since.
        billed: The sum of its finalized lines that are not void; None: there is none.
        last_due: What was due when the last of them was made, less what that one had counted and is void by now.
        price_id: That of the oldest of them.
    """

    tenant_id: str
    event_type: str
    period_start: datetime
    quantity: Decimal
    is_covered: bool
    billed: Decimal | None
    last_due: Decimal | None
    price_id: UUID | None


@dataclass(frozen=True, slots=True)
class BilledFeeSum:
    """A base fee for an interval that was billed.

    Attributes:
        billed: The sum of its lines that are not void.
        due: What was due of it when the last of them was made, less what that one had counted as billed and is void by
            now: that is to be billed again.
    """

    tenant_id: str
    subscription_id: UUID
    period_start: datetime
    billed: Decimal
    due: Decimal


@dataclass(frozen=True, slots=True)
class CoverDifference:
    """A snapshot that an invoice counts other than once, or without covering it; or covers without counting it."""

    snapshot_id: UUID
    invoice_id: UUID
    times_counted: int
    is_covered: bool


@dataclass(frozen=True, slots=True)
class QuantityDifference:
    """A line's `quantity`, and the one that was `used` by the snapshots up to its invoice's `through_epoch`."""

    invoice_id: UUID
    line_id: UUID
    quantity: Decimal
    used: Decimal


@dataclass(frozen=True, slots=True)
class StrangeSnapshot:
    """A snapshot that a line covers and that is of another use, of a later epoch, or not here."""

    invoice_id: UUID
    line_id: UUID
    snapshot_id: UUID


@dataclass(frozen=True, slots=True)
class CountDifference:
    """What a line counts as billed before it and should not, or should and does not.

    Attributes:
        amount: Of the line that is counted, or should be.
        is_void: Of its invoice; None: there is no such line of the same subject before.
        is_alike: It has the price and the tax rate of the line that counts it.
    """

    invoice_id: UUID
    line_id: UUID
    counted_id: UUID | None
    counted_invoice_id: UUID | None
    amount: Decimal | None
    is_void: bool | None
    is_alike: bool | None
    times_counted: int


@dataclass(frozen=True, slots=True)
class StoredLine:
    """A finalized line as it is stored: of a use with its price and quantity, or of a fee with its plan and seconds.

    Attributes:
        counted_lines: How many lines it counts as billed before; None: what it counts cannot be read.
        previously_billed: The sum of their amounts; None likewise.
    """

    line_id: UUID
    kind: str
    tenant_id: str
    period: Period
    event_type: str | None
    price_id: UUID | None
    quantity: Decimal | None
    plan_id: UUID | None
    fee_seconds: int | None
    tax_rate: Decimal
    rated_amount: Decimal
    amount: Decimal
    counted_lines: int | None
    previously_billed: Decimal | None


@dataclass(frozen=True, slots=True)
class StoredInvoice:
    """A finalized invoice as it is stored."""

    invoice_id: UUID
    number: int
    tenant_id: str
    period: Period
    currency: str
    subtotal: Decimal
    tax: Decimal
    total: Decimal
    lines: Sequence[StoredLine]


@dataclass(frozen=True, slots=True)
class InvoiceMoney:
    """What became of an invoice.

    Attributes:
        credit_change: What it granted to its tenant's credit (> 0) or drew (< 0), less what was undone.
        credited: The sum of the credit notes on it; so are `credited_subtotal` and `credited_tax`.
        reduced: What of that reduced its amount due.
        notes_not_granted: Credit notes whose `credit_granted` is not what the tenant's credit has of them.
        notes_not_of_lines: Credit notes whose subtotal is not that of their lines.
    """

    invoice_id: UUID
    is_void: bool
    subtotal: Decimal
    tax: Decimal
    total: Decimal
    amount_due: Decimal
    amount_paid: Decimal
    credit_change: Decimal
    credited_subtotal: Decimal
    credited_tax: Decimal
    credited: Decimal
    reduced: Decimal
    notes_not_granted: int
    notes_not_of_lines: int


@dataclass(frozen=True, slots=True)
class NegativeCredit:
    """More was drawn than there was."""

    tenant_id: str
    currency: str
    balance: Decimal


@dataclass(frozen=True, slots=True)
class OrphanEntry:
    """An entry of a tenant's credit without the invoice or the credit note that made it."""

    tenant_id: str
    invoice_id: UUID
    currency: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class NoteNumbers:
    """How many credit notes there are, the first and the last of their numbers, and the last that was given."""

    notes: int
    first: int
    last: int
    counted: int
