"""Invoices and jobs as the API has them, as far as they are shown."""

from __future__ import annotations

import msgspec


class Tier(msgspec.Struct, frozen=True):
    """What one tier of a price contributed to a line."""

    quantity: str
    unit_amount: str
    flat_amount: str
    amount: str
    up_to: str | None = None
    bound: str | None = None


class Price(msgspec.Struct, frozen=True):
    """How the line's quantity was rated."""

    model: str
    currency: str


class PriceVersion(msgspec.Struct, frozen=True):
    """The price that a line is pinned to."""

    id: str
    price: Price


class BilledLine(msgspec.Struct, frozen=True):
    """What was billed of the same use before."""

    invoice_id: str
    amount: str


class BaseFee(msgspec.Struct, frozen=True):
    """The part of a plan's fee that an interval is charged."""

    plan_name: str
    amount: str
    seconds: int
    interval_seconds: int


class Line(msgspec.Struct, frozen=True):
    """What is owed for one event type and period, or for a base fee."""

    kind: str
    period_start: str
    period_end: str
    rated_amount: str
    amount: str
    event_type: str = ""
    quantity: str = ""
    price: PriceVersion | None = None
    base_fee: BaseFee | None = None
    breakdown: list[Tier] = []
    previously_billed: list[BilledLine] = []


class Invoice(msgspec.Struct, frozen=True):
    """What a tenant owes for a period; lists leave the lines out."""

    id: str
    tenant_id: str
    status: str
    currency: str
    period_start: str
    period_end: str
    subtotal: str
    tax: str
    total: str
    amount_due: str
    number: int | None = None
    through_epoch: int = 0
    issued_at: str | None = None
    due_at: str | None = None
    paid_at: str | None = None
    lines: list[Line] = []
    unpriced_event_types: list[str] = []


class Job(msgspec.Struct, frozen=True):
    """Long work of the server's."""

    id: str
    state: str
    done: int = 0
    total: int = 0
    problems: list[str] = []
