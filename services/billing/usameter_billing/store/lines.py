"""Invoice lines as rows: the same columns for drafts and for finalized invoices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Literal
from uuid import UUID

import asyncpg
import msgspec

from usameter_billing.domain.base_fees import BilledFee, Subject
from usameter_billing.domain.invoice import BilledLine, DueLine, FeeCharge, InvoiceLine, LineKind, UseCharge
from usameter_billing.domain.plan import Plan
from usameter_billing.store.ledger import load_snapshots
from usameter_billing.store.plans import load_plans
from usameter_billing.store.prices import load_prices_by_id
from usameter_core.ids import OrgId
from usameter_core.period import Period
from usameter_proof.pricing import PriceVersion

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection


@dataclass(frozen=True, slots=True)
class NewLine:
    """A line to be written, as the `position`-th of an invoice."""

    invoice_id: UUID
    position: int
    line_id: UUID
    tenant_id: str
    due: DueLine


async def insert_lines(
    connection: Connection,
    org_id: OrgId,
    lines: Sequence[NewLine],
    *,
    table: Literal["draft_line", "invoice_line"],
) -> None:
    """Write lines of drafts, or of finalized invoices."""
    charges = [_columns_of(line.due.charge) for line in lines]
    await connection.execute(
        f"""
        INSERT INTO billing.{table}
            (org_id, invoice_id, position, line_id, kind, tenant_id, period_start, period_end, event_type, price_id,
             quantity, subscription_id, plan_id, fee_seconds, tax_rate, rated_amount, amount, previously_billed,
             snapshot_ids)
        SELECT $1, invoice_id, position, line_id, kind, tenant_id, period_start, period_end, event_type, price_id,
               quantity, subscription_id, plan_id, fee_seconds, tax_rate, rated_amount, amount, previously_billed,
               snapshot_ids::uuid[]
        FROM unnest(
            $2::uuid[], $3::integer[], $4::uuid[], $5::text[], $6::text[], $7::timestamptz[], $8::timestamptz[],
            $9::text[], $10::uuid[], $11::numeric[], $12::uuid[], $13::uuid[], $14::bigint[], $15::numeric[],
            $16::numeric[], $17::numeric[], $18::json[], $19::text[]
        ) AS line (invoice_id, position, line_id, kind, tenant_id, period_start, period_end, event_type, price_id,
                   quantity, subscription_id, plan_id, fee_seconds, tax_rate, rated_amount, amount,
                   previously_billed, snapshot_ids)
        """,
        org_id,
        [line.invoice_id for line in lines],
        [line.position for line in lines],
        [line.line_id for line in lines],
        [line.due.kind.value for line in lines],
        [line.tenant_id for line in lines],
        [line.due.period.start for line in lines],
        [line.due.period.end for line in lines],
        [charge.event_type for charge in charges],
        [charge.price_id for charge in charges],
        [charge.quantity for charge in charges],
        [charge.subscription_id for charge in charges],
        [charge.plan_id for charge in charges],
        [charge.fee_seconds for charge in charges],
        [line.due.tax_rate for line in lines],
        [line.due.rated_amount for line in lines],
        [line.due.amount for line in lines],
        [_billed_to_json(line.due.previously_billed) for line in lines],
        # An array of arrays of different lengths is no PostgreSQL array: each travels as its text form.
        [f"{{{','.join(each.hex for each in line.due.snapshot_ids)}}}" for line in lines],
    )


async def load_lines(connection: Connection, org_id: OrgId, invoice_id: UUID) -> tuple[InvoiceLine, ...]:
    """The lines of a draft or an invoice, in order, with their prices, plans and snapshots."""
    rows = await connection.fetch(
        """
        SELECT line_id, kind, period_start, period_end, event_type, price_id, quantity, subscription_id, plan_id,
               fee_seconds, tax_rate, rated_amount, amount, previously_billed, snapshot_ids
        FROM billing.any_line WHERE org_id = $1 AND invoice_id = $2 ORDER BY position
        """,
        org_id,
        invoice_id,
    )
    prices = await load_prices_by_id(connection, org_id, [row["price_id"] for row in rows if row["price_id"]])
    plans = await load_plans(connection, org_id, [row["plan_id"] for row in rows if row["plan_id"]])
    ids = [snapshot_id for row in rows for snapshot_id in row["snapshot_ids"]]
    snapshots = await load_snapshots(connection, org_id, ids)
    return tuple(
        InvoiceLine(
            row["line_id"],
            _due_line_from_row(row, _charge_from_row(row, prices, plans)),
            tuple(snapshots[snapshot_id] for snapshot_id in row["snapshot_ids"]),
        )
        for row in rows
    )


async def load_billed_fees(
    connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]
) -> dict[str, tuple[BilledFee, ...]]:
    """All that is billed of the base fees of these tenants, by tenant; one without any is not in it."""
    rows = await connection.fetch(
        """
        SELECT line.tenant_id, line.subscription_id, line.plan_id, line.period_start, line.period_end,
               line.invoice_id, line.line_id, line.amount, line.tax_rate
        FROM unnest($2::text[]) AS tenant (tenant_id)
        CROSS JOIN LATERAL (
            SELECT tenant_id, subscription_id, plan_id, period_start, period_end, invoice_id, line_id, amount, tax_rate
            FROM billing.invoice_line
            WHERE org_id = $1 AND tenant_id = tenant.tenant_id AND subscription_id IS NOT NULL
            OFFSET 0
        ) AS line
        CROSS JOIN LATERAL (
            SELECT number, status FROM billing.invoice
            WHERE org_id = $1 AND invoice_id = line.invoice_id
            OFFSET 0
        ) AS invoice
        WHERE invoice.status <> 'void'
        ORDER BY invoice.number
        """,
        org_id,
        tenant_ids,
    )
    plans = await load_plans(connection, org_id, [row["plan_id"] for row in rows])
    found: dict[str, dict[Subject, BilledFee]] = {}
    for row in rows:
        of_tenant = found.setdefault(row["tenant_id"], {})
        fee = _billed_fee_from_row(row, plans)
        first = of_tenant.get(fee.subject)
        of_tenant[fee.subject] = replace(first, lines=first.lines + fee.lines) if first else fee
    return {tenant_id: tuple(fees.values()) for tenant_id, fees in found.items()}


@dataclass(frozen=True, slots=True)
class _Columns:
    """What a line is about, as columns: those of a use, or those of a base fee."""

    event_type: str | None = None
    price_id: UUID | None = None
    quantity: Decimal | None = None
    subscription_id: UUID | None = None
    plan_id: UUID | None = None
    fee_seconds: int | None = None


def _columns_of(charge: UseCharge | FeeCharge) -> _Columns:
    match charge:
        case UseCharge(event_type, price, quantity):
            return _Columns(event_type=event_type, price_id=price.price_id, quantity=quantity)
        case FeeCharge(subscription_id, plan, seconds):
            return _Columns(subscription_id=subscription_id, plan_id=plan.plan_id, fee_seconds=seconds)


def _charge_from_row(
    row: asyncpg.Record, prices: Mapping[UUID, PriceVersion], plans: Mapping[UUID, Plan]
) -> UseCharge | FeeCharge:
    if row["plan_id"] is None:
        return UseCharge(row["event_type"], prices[row["price_id"]], row["quantity"])
    return FeeCharge(row["subscription_id"], plans[row["plan_id"]], row["fee_seconds"])


def _due_line_from_row(row: asyncpg.Record, charge: UseCharge | FeeCharge) -> DueLine:
    return DueLine(
        kind=LineKind(row["kind"]),
        period=Period(row["period_start"], row["period_end"]),
        charge=charge,
        tax_rate=row["tax_rate"],
        rated_amount=row["rated_amount"],
        amount=row["amount"],
        previously_billed=_billed_from_json(row["previously_billed"]),
        snapshot_ids=tuple(row["snapshot_ids"]),
    )


def _billed_fee_from_row(row: asyncpg.Record, plans: Mapping[UUID, Plan]) -> BilledFee:
    return BilledFee(
        subscription_id=row["subscription_id"],
        plan=plans[row["plan_id"]],
        interval=Period(row["period_start"], row["period_end"]),
        lines=(BilledLine(row["invoice_id"], row["line_id"], row["amount"]),),
        tax_rate=row["tax_rate"],
    )


def _billed_to_json(lines: tuple[BilledLine, ...]) -> str:
    return msgspec.json.encode(lines).decode() if lines else "[]"


def _billed_from_json(text: str) -> tuple[BilledLine, ...]:
    return msgspec.json.decode(text, type=tuple[BilledLine, ...])
