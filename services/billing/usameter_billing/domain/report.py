"""Sums over invoices, as values."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class ReportSum:
    """An amount, and how many invoices it comes from."""

    amount: Decimal
    count: int


@dataclass(frozen=True, slots=True)
class CurrencyReport:
    """Sums in one currency; what each is says report.proto."""

    currency: str
    billed: ReportSum
    paid: ReportSum
    pending: ReportSum
    overdue: ReportSum
    uncollectible: ReportSum
    credited: ReportSum
    credit_drawn: ReportSum
    void: ReportSum
    draft: ReportSum
