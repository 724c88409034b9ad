"""What an audit reads, all of it in one snapshot of the database and without a lock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import DecimalException
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
import msgspec

from usameter_billing.domain.auditing import BilledFeeSum, BilledUse, CoverDifference, StoredInvoice, StoredLine
from usameter_billing.domain.plan import Plan, PlanInterval
from usameter_billing.store.counted_lines import IS_READABLE, READABLE_LINES
from usameter_billing.store.prices import PRICE_COLUMNS, price_from_row
from usameter_core.audit import VIOLATIONS_MAX
from usameter_core.errors import Internal, InvalidArgument
from usameter_core.ids import OrgId
from usameter_core.period import Period
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_proof.pricing import PriceVersion

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

# The lines that count as billed, of an organization $1 and tenants $2.
_BILLED_LINES = """
    billing.invoice_line AS line JOIN billing.invoice AS invoice USING (org_id, invoice_id)
    WHERE line.org_id = $1 AND line.tenant_id = ANY($2::text[]) AND invoice.status <> 'void'"""


@asynccontextmanager
async def open_moment(pool: Pool) -> AsyncIterator[Connection]:
    """A read-only transaction whose statements all see the same."""
    with unavailable_without_postgres():
        async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            # As for generation (`store.ledger`): statistics may be older than most rows, and a plan that
            # compares each of many with every other would not end.
            await connection.execute("SET LOCAL enable_nestloop = off")
            # What cannot do without nested loops looks so expensive then that it would be compiled each time.
            await connection.execute("SET LOCAL jit = off")
            yield connection


async def count_snapshots(connection: Connection, org_id: OrgId, *, after_epoch: int, through_epoch: int) -> int:
    """Snapshots of the epochs after one and up to another."""
    count: int = await connection.fetchval(
        "SELECT count(*) FROM billing.snapshot WHERE org_id = $1 AND epoch > $2 AND epoch <= $3",
        org_id,
        after_epoch,
        through_epoch,
    )
    return count


async def list_tenants(connection: Connection, org_id: OrgId, *, after: str, limit: int) -> list[str]:
    """The next tenants, ascending, that have a snapshot or a finalized invoice."""
    rows = await connection.fetch(
        """
        SELECT tenant_id FROM (
            (
                SELECT DISTINCT tenant_id FROM billing.snapshot WHERE org_id = $1 AND tenant_id > $2
                ORDER BY tenant_id LIMIT $3
            )
            UNION
            (
                SELECT DISTINCT tenant_id FROM billing.invoice WHERE org_id = $1 AND tenant_id > $2
                ORDER BY tenant_id LIMIT $3
            )
        ) AS tenant
        ORDER BY tenant_id LIMIT $3
        """,
        org_id,
        after,
        limit,
    )
    return [row["tenant_id"] for row in rows]


async def load_billed_uses(connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]) -> list[BilledUse]:
    """All uses of the tenants that have a snapshot, or a line that is not void.

    Void is for ever, and invoices are numbered and voided under the lock of the tenant's account: the last line that is
    not void has counted all before it that are not void now. What it has counted beside them was voided since, whatever
    clocks say, and is due again.
    """
    rows = await connection.fetch(
        f"""
        WITH use_line AS MATERIALIZED (
            SELECT line.tenant_id, line.event_type, line.period_start, line.line_id, line.price_id, line.amount,
                   line.rated_amount, {READABLE_LINES} AS previously_billed, invoice.number,
                   invoice.status = 'void' AS is_void
            FROM billing.invoice_line AS line JOIN billing.invoice AS invoice USING (org_id, invoice_id)
            WHERE line.org_id = $1 AND line.tenant_id = ANY($2::text[]) AND line.event_type IS NOT NULL
        ), last_line AS (
            SELECT DISTINCT ON (tenant_id, event_type, period_start)
                   tenant_id, event_type, period_start, rated_amount,
                   ARRAY(
                       SELECT (billed->>'line_id')::uuid FROM json_array_elements(previously_billed) AS billed
                   ) AS counted
            FROM use_line WHERE NOT is_void
            ORDER BY tenant_id, event_type, period_start, number DESC
        ), billed AS (
            SELECT tenant_id, event_type, period_start,
                   sum(line.amount) FILTER (WHERE NOT is_void) AS billed,
                   last_line.rated_amount - coalesce(
                       sum(line.amount) FILTER (WHERE is_void AND line_id = ANY(counted)), 0
                   ) AS last_due,
                   -- A void line that covered nothing leaves no snapshot uncovered: until the next invoice only this
                   -- tells that something is due again.
                   bool_or(is_void AND line_id = ANY(counted)) AS is_taken_back,
                   (array_agg(line.price_id ORDER BY line.number) FILTER (WHERE NOT is_void))[1] AS price_id
            FROM use_line AS line JOIN last_line USING (tenant_id, event_type, period_start)
            GROUP BY tenant_id, event_type, period_start, last_line.rated_amount
        ), used AS (
            SELECT snapshot.tenant_id, snapshot.event_type, period.period_start, sum(snapshot.total) AS quantity,
                   count(*) AS snapshots, count(cover.invoice_id) AS covered
            FROM billing.snapshot AS snapshot
            JOIN billing.billing_period AS period
                ON period.org_id = snapshot.org_id AND period.tenant_id = snapshot.tenant_id
                AND snapshot.day >= (period.period_start AT TIME ZONE 'UTC')::date
                AND snapshot.day < (period.period_end AT TIME ZONE 'UTC')::date
            LEFT JOIN billing.snapshot_cover AS cover
                ON cover.org_id = snapshot.org_id AND cover.snapshot_id = snapshot.snapshot_id
            WHERE snapshot.org_id = $1 AND snapshot.tenant_id = ANY($2::text[])
            GROUP BY snapshot.tenant_id, snapshot.event_type, period.period_start
        )
        SELECT tenant_id, event_type, period_start, coalesce(quantity, 0) AS quantity,
               coalesce(snapshots, 0) = coalesce(covered, 0) AND NOT coalesce(is_taken_back, false) AS is_covered,
               billed, last_due, price_id
        FROM used FULL JOIN billed USING (tenant_id, event_type, period_start)
        ORDER BY tenant_id, period_start, event_type
        """,
        org_id,
        tenant_ids,
    )
    return [BilledUse(**dict(row)) for row in rows]


async def load_audited_prices(
    connection: Connection, org_id: OrgId, price_ids: Sequence[UUID]
) -> dict[UUID, PriceVersion | None]:
    """The versions with these ids, as far as there are any; None is one whose terms describe no price."""
    rows = await connection.fetch(
        f"SELECT {PRICE_COLUMNS} FROM billing.price WHERE org_id = $1 AND price_id = ANY($2::uuid[])", org_id, price_ids
    )
    return {row["price_id"]: _price_or_none(row) for row in rows}


def _price_or_none(row: asyncpg.Record) -> PriceVersion | None:
    # What is wrong with a stored price must not end the audit that is to say so.
    try:
        return price_from_row(row)
    except (InvalidArgument, Internal, msgspec.DecodeError, DecimalException):
        return None


async def load_audited_plans(connection: Connection, org_id: OrgId, plan_ids: Sequence[UUID]) -> dict[UUID, Plan]:
    """The plans with these ids, as far as there are any, without their prices: those may be none."""
    rows = await connection.fetch(
        """
        SELECT plan_id, name, base_fee, currency, interval, created_at FROM billing.plan
        WHERE org_id = $1 AND plan_id = ANY($2::uuid[])
        """,
        org_id,
        plan_ids,
    )
    return {row["plan_id"]: audited_plan_from_row(row) for row in rows}


def audited_plan_from_row(row: asyncpg.Record) -> Plan:
    """The only reader of an audited plan's row."""
    return Plan(
        plan_id=row["plan_id"],
        name=row["name"],
        base_fee=row["base_fee"],
        currency=row["currency"],
        interval=PlanInterval(row["interval"]),
        prices=(),
        created_at=row["created_at"],
    )


async def list_fee_differences(connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]) -> list[BilledFeeSum]:
    """Base fees of the tenants whose lines do not add up to what was last due; the first so many.

    Void is for ever, and invoices are numbered and voided under the lock of the tenant's account: the last line that is
    not void has counted all before it that are not void now. What it has counted beside them was voided since, whatever
    clocks say, and nothing else may be missing.
    """
    rows = await connection.fetch(
        f"""
        WITH fee_line AS MATERIALIZED (
            SELECT line.tenant_id, line.subscription_id, line.plan_id, line.period_start, line.line_id, line.amount,
                   line.rated_amount, {READABLE_LINES} AS previously_billed, invoice.number,
                   invoice.status = 'void' AS is_void
            FROM billing.invoice_line AS line JOIN billing.invoice AS invoice USING (org_id, invoice_id)
            WHERE line.org_id = $1 AND line.tenant_id = ANY($2::text[]) AND line.subscription_id IS NOT NULL
        ), last_line AS (
            SELECT DISTINCT ON (tenant_id, subscription_id, plan_id, period_start)
                   tenant_id, subscription_id, plan_id, period_start, rated_amount,
                   ARRAY(
                       SELECT (billed->>'line_id')::uuid FROM json_array_elements(previously_billed) AS billed
                   ) AS counted
            FROM fee_line WHERE NOT is_void
            ORDER BY tenant_id, subscription_id, plan_id, period_start, number DESC
        ), fee AS (
            SELECT tenant_id, subscription_id, period_start,
                   sum(line.amount) FILTER (WHERE NOT is_void) AS billed,
                   last_line.rated_amount - coalesce(
                       sum(line.amount) FILTER (WHERE is_void AND line_id = ANY(counted)), 0
                   ) AS due
            FROM fee_line AS line JOIN last_line USING (tenant_id, subscription_id, plan_id, period_start)
            GROUP BY tenant_id, subscription_id, plan_id, period_start, last_line.rated_amount
        )
        SELECT * FROM fee WHERE billed <> due ORDER BY tenant_id, period_start, subscription_id LIMIT $3
        """,
        org_id,
        tenant_ids,
        VIOLATIONS_MAX,
    )
    return [BilledFeeSum(**dict(row)) for row in rows]


async def list_lost_snapshots(connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]) -> list[UUID]:
    """Snapshots of the tenants that are neither covered nor pending; the first so many."""
    rows = await connection.fetch(
        """
        SELECT snapshot.snapshot_id FROM billing.snapshot AS snapshot
        LEFT JOIN billing.snapshot_cover AS cover
            ON cover.org_id = snapshot.org_id AND cover.snapshot_id = snapshot.snapshot_id
        LEFT JOIN billing.pending_use AS pending
            ON pending.org_id = snapshot.org_id AND pending.tenant_id = snapshot.tenant_id
            AND pending.event_type = snapshot.event_type AND pending.epoch = snapshot.epoch
            AND snapshot.day >= (pending.period_start AT TIME ZONE 'UTC')::date
            AND snapshot.day < (pending.period_end AT TIME ZONE 'UTC')::date
        WHERE snapshot.org_id = $1 AND snapshot.tenant_id = ANY($2::text[])
        AND cover.invoice_id IS NULL AND pending.epoch IS NULL
        ORDER BY snapshot.snapshot_id LIMIT $3
        """,
        org_id,
        tenant_ids,
        VIOLATIONS_MAX,
    )
    return [row["snapshot_id"] for row in rows]


async def list_cover_differences(
    connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]
) -> list[CoverDifference]:
    """Where what the tenants' invoices cover is not what their lines count; the first so many."""
    rows = await connection.fetch(
        f"""
        SELECT snapshot_id, invoice_id, coalesce(times_counted, 0) AS times_counted,
               is_covered IS NOT NULL AS is_covered
        FROM (
            SELECT snapshot_id, line.invoice_id, count(*) AS times_counted
            FROM (SELECT line.invoice_id, line.snapshot_ids FROM {_BILLED_LINES}) AS line
            CROSS JOIN LATERAL unnest(line.snapshot_ids) AS counted (snapshot_id)
            GROUP BY snapshot_id, line.invoice_id
        ) AS counted
        FULL JOIN (
            SELECT cover.snapshot_id, cover.invoice_id, true AS is_covered
            FROM billing.snapshot AS snapshot
            JOIN billing.snapshot_cover AS cover
                ON cover.org_id = snapshot.org_id AND cover.snapshot_id = snapshot.snapshot_id
            WHERE snapshot.org_id = $1 AND snapshot.tenant_id = ANY($2::text[])
        ) AS cover USING (snapshot_id, invoice_id)
        WHERE times_counted IS DISTINCT FROM 1 OR is_covered IS NULL
        ORDER BY snapshot_id, invoice_id LIMIT $3
        """,
        org_id,
        tenant_ids,
        VIOLATIONS_MAX,
    )
    return [CoverDifference(**dict(row)) for row in rows]


async def load_last_number(connection: Connection, org_id: OrgId) -> int:
    """The number that was given last; 0 before the first."""
    number: int | None = await connection.fetchval(
        "SELECT last_number FROM billing.invoice_number WHERE org_id = $1", org_id
    )
    return number or 0


async def list_stored_invoices(connection: Connection, org_id: OrgId, *, after: int, limit: int) -> list[StoredInvoice]:
    """Finalized invoices by number, whatever their status, with their lines."""
    rows = await connection.fetch(
        """
        SELECT invoice_id, number, tenant_id, period_start, period_end, currency, subtotal, tax, total
        FROM billing.invoice
        WHERE org_id = $1 AND number > $2 ORDER BY number LIMIT $3
        """,
        org_id,
        after,
        limit,
    )
    line_rows = await connection.fetch(
        f"""
        WITH stored AS MATERIALIZED (
            SELECT line.*, {IS_READABLE} AS is_readable
            FROM billing.invoice_line AS line WHERE org_id = $1 AND invoice_id = ANY($2::uuid[])
        )
        SELECT invoice_id, line_id, kind, tenant_id, period_start, period_end, event_type, price_id, quantity, plan_id,
               fee_seconds, tax_rate, rated_amount, amount,
               CASE WHEN is_readable THEN json_array_length(previously_billed) END AS counted_lines,
               CASE WHEN is_readable THEN (
                   SELECT coalesce(sum((billed->>'amount')::numeric), 0)
                   FROM json_array_elements(previously_billed) AS billed
               ) END AS previously_billed
        FROM stored ORDER BY invoice_id, position
        """,
        org_id,
        [row["invoice_id"] for row in rows],
    )
    lines: dict[UUID, list[StoredLine]] = defaultdict(list)
    for row in line_rows:
        lines[row["invoice_id"]].append(stored_line_from_row(row))
    return [stored_invoice_from_row(row, lines[row["invoice_id"]]) for row in rows]


def stored_invoice_from_row(row: asyncpg.Record, lines: Sequence[StoredLine]) -> StoredInvoice:
    """The only reader of an audited invoice's row."""
    return StoredInvoice(
        invoice_id=row["invoice_id"],
        number=row["number"],
        tenant_id=row["tenant_id"],
        period=Period(row["period_start"], row["period_end"]),
        currency=row["currency"],
        subtotal=row["subtotal"],
        tax=row["tax"],
        total=row["total"],
        lines=lines,
    )


def stored_line_from_row(row: asyncpg.Record) -> StoredLine:
    """The only reader of an audited line's row."""
    return StoredLine(
        line_id=row["line_id"],
        kind=row["kind"],
        tenant_id=row["tenant_id"],
        period=Period(row["period_start"], row["period_end"]),
        event_type=row["event_type"],
        price_id=row["price_id"],
        quantity=row["quantity"],
        plan_id=row["plan_id"],
        fee_seconds=row["fee_seconds"],
        tax_rate=row["tax_rate"],
        rated_amount=row["rated_amount"],
        amount=row["amount"],
        counted_lines=row["counted_lines"],
        previously_billed=row["previously_billed"],
    )
