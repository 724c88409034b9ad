"""A tenant's credit, as values: a ledger for each currency, whose sum is the balance and never below 0."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from uuid import UUID


class CreditKind(StrEnum):
    """Why the credit changed; the names are those of usameter/billing/v1/credit.proto."""

    GRANTED = "GRANTED"
    DRAWN = "DRAWN"
    RETURNED = "RETURNED"
    REVOKED = "REVOKED"


@dataclass(frozen=True, slots=True)
class CreditEntry:
    """A change of a tenant's credit.

    Attributes:
        amount: > 0 where it was granted or returned, < 0 where it was drawn or revoked.
        invoice_id: The invoice that changed it.
        credit_note_id: Which has credited that invoice, and so granted this; None: the invoice did it.
    """

    entry_id: UUID
    tenant_id: str
    currency: str
    kind: CreditKind
    amount: Decimal
    invoice_id: UUID
    credit_note_id: UUID | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class CreditBalance:
    """What a tenant has to its credit in one currency."""

    tenant_id: str
    currency: str
    balance: Decimal
