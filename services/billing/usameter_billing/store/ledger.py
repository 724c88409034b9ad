"""The pulled part of the ledger: snapshots, how far they reach, and which use is uncovered.

The queries of generation look rows up one by one, by index: LATERAL with OFFSET 0 keeps the planner from
any other join. Left to itself, with the statistics of tables that were empty a minute ago, it scanned
all lines of the organization for each of a batch: 1.7 seconds instead of 10 ms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_billing.domain.invoice import BilledLine, Snapshot
from usameter_billing.domain.invoicing import PeriodUse
from usameter_billing.domain.tiling import Tiling
from usameter_core.ids import OrgId
from usameter_core.period import Period, day_period

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

# (tenant, event type, epoch, day): what a snapshot says was used, without how much.
Use = tuple[str, str, int, date]

_CALENDAR = Tiling()


async def load_through_epoch(connection: Connection, org_id: OrgId) -> int:
    """The epoch up to which all snapshots are here; 0 before the first."""
    epoch: int | None = await connection.fetchval(
        "SELECT through_epoch FROM billing.ledger_cursor WHERE org_id = $1", org_id
    )
    return epoch or 0


async def lock_cursor(connection: Connection, org_id: OrgId) -> None:
    """Let nobody else keep snapshots of the organization until the end of the transaction.

    Two that insert the same billing period at the same moment would otherwise meet its exclusion
    constraint, which fails where the primary key waits.
    """
    await connection.execute(
        """
        INSERT INTO billing.ledger_cursor (org_id, through_epoch) VALUES ($1, 0)
        ON CONFLICT ON CONSTRAINT ledger_cursor_pkey DO UPDATE SET through_epoch = ledger_cursor.through_epoch
        """,
        org_id,
    )


async def advance_cursor(connection: Connection, org_id: OrgId, through_epoch: int) -> None:
    """Every snapshot up to this epoch is here. Never moves back."""
    await connection.execute(
        """
        UPDATE billing.ledger_cursor SET through_epoch = greatest(through_epoch, $2) WHERE org_id = $1
        """,
        org_id,
        through_epoch,
    )


async def add_snapshots(
    connection: Connection, org_id: OrgId, snapshots: Sequence[Snapshot], *, tilings: Mapping[str, Tiling]
) -> None:
    """Keep copies of those that are not here yet, and note their use as pending; the cursor is locked.

    What is here already is left alone, also its pending use: it may be covered by now. `tilings` are those of
    the tenants that have or had a subscription; the others' periods are calendar months.
    """
    rows = await connection.fetch(
        """
        INSERT INTO billing.snapshot (org_id, snapshot_id, epoch, tenant_id, event_type, day, entry_count, total, root)
        SELECT $1, * FROM unnest(
            $2::uuid[], $3::bigint[], $4::text[], $5::text[], $6::date[], $7::bigint[], $8::numeric[], $9::bytea[]
        )
        ON CONFLICT ON CONSTRAINT snapshot_pkey DO NOTHING
        RETURNING snapshot_id
        """,
        org_id,
        [snapshot.snapshot_id for snapshot in snapshots],
        [snapshot.epoch for snapshot in snapshots],
        [snapshot.tenant_id for snapshot in snapshots],
        [snapshot.event_type for snapshot in snapshots],
        [snapshot.day for snapshot in snapshots],
        [snapshot.entry_count for snapshot in snapshots],
        [snapshot.total for snapshot in snapshots],
        [snapshot.root for snapshot in snapshots],
    )
    added = {row["snapshot_id"] for row in rows}
    uses = {(each.tenant_id, each.event_type, each.epoch, each.day) for each in snapshots if each.snapshot_id in added}
    await _add_pending(connection, org_id, uses, tilings)


async def recut_periods(
    connection: Connection, org_id: OrgId, tenant_id: str, *, tiling: Tiling, since: datetime
) -> None:
    """Cut the tenant's time anew from `since` on; its account and the cursor are locked.

    A period began at `since` before and does now, and no invoice covers anything from there on.
    """
    for table in ("billing_period", "pending_use"):
        await connection.execute(
            f"DELETE FROM billing.{table} WHERE org_id = $1 AND tenant_id = $2 AND period_start >= $3",
            org_id,
            tenant_id,
            since,
        )
    rows = await connection.fetch(
        """
        SELECT DISTINCT event_type, epoch, day FROM billing.snapshot
        WHERE org_id = $1 AND tenant_id = $2 AND day >= $3
        """,
        org_id,
        tenant_id,
        since.date(),
    )
    uses = {(tenant_id, row["event_type"], row["epoch"], row["day"]) for row in rows}
    await _add_pending(connection, org_id, uses, {tenant_id: tiling})


async def _add_pending(
    connection: Connection, org_id: OrgId, uses: Collection[Use], tilings: Mapping[str, Tiling]
) -> None:
    periods = _periods_of(uses, tilings)
    tenant_periods = sorted({(use[0], period.start, period.end) for use, period in periods.items()})
    await connection.execute(
        """
        INSERT INTO billing.billing_period (org_id, tenant_id, period_start, period_end)
        SELECT $1, * FROM unnest($2::text[], $3::timestamptz[], $4::timestamptz[])
        ON CONFLICT ON CONSTRAINT billing_period_pkey DO NOTHING
        """,
        org_id,
        [tenant_id for tenant_id, _, _ in tenant_periods],
        [start for _, start, _ in tenant_periods],
        [end for _, _, end in tenant_periods],
    )
    pending = sorted(
        {
            (tenant_id, period.start, event_type, epoch, period.end)
            for (tenant_id, event_type, epoch, _), period in periods.items()
        }
    )
    await connection.execute(
        """
        INSERT INTO billing.pending_use (org_id, tenant_id, period_start, event_type, epoch, period_end)
        SELECT $1, * FROM unnest($2::text[], $3::timestamptz[], $4::text[], $5::bigint[], $6::timestamptz[])
        ON CONFLICT ON CONSTRAINT pending_use_pkey DO NOTHING
        """,
        org_id,
        [tenant_id for tenant_id, _, _, _, _ in pending],
        [start for _, start, _, _, _ in pending],
        [event_type for _, _, event_type, _, _ in pending],
        [epoch for _, _, _, epoch, _ in pending],
        [end for _, _, _, _, end in pending],
    )


def _periods_of(uses: Collection[Use], tilings: Mapping[str, Tiling]) -> dict[Use, Period]:
    # Thousands of uses a page share a few days, and nearly all their tenants the calendar.
    known: dict[tuple[str, date], Period] = {}
    periods = {}
    for use in uses:
        tenant_id, _, _, day = use
        key = (tenant_id if tenant_id in tilings else "", day)
        if key not in known:
            known[key] = tilings.get(tenant_id, _CALENDAR).period_of(day_period(day).start)
        periods[use] = known[key]
    return periods


async def uncover_snapshots(connection: Connection, org_id: OrgId, invoice_id: UUID) -> None:
    """End the cover of what a void invoice covered: its use is pending again."""
    await connection.execute(
        """
        INSERT INTO billing.pending_use (org_id, tenant_id, period_start, event_type, epoch, period_end)
        SELECT DISTINCT $1::uuid, line.tenant_id, line.period_start, line.event_type, snapshot.epoch, line.period_end
        FROM billing.invoice_line AS line
        CROSS JOIN LATERAL unnest(line.snapshot_ids) AS covered (snapshot_id)
        CROSS JOIN LATERAL (
            SELECT epoch FROM billing.snapshot
            WHERE org_id = $1 AND snapshot_id = covered.snapshot_id
            OFFSET 0
        ) AS snapshot
        WHERE line.org_id = $1 AND line.invoice_id = $2
        ON CONFLICT ON CONSTRAINT pending_use_pkey DO NOTHING
        """,
        org_id,
        invoice_id,
    )
    await connection.execute("SELECT billing.uncover_snapshots($1, $2)", org_id, invoice_id)


async def load_pending_tenants(
    connection: Connection, org_id: OrgId, *, period: Period, after: str, through: str | None, limit: int
) -> list[str]:
    """The next tenants, ascending, with uncovered use up to the end of the period, or a subscription by then.

    At most `limit`, behind `after` and up to `through` (None: to the end). What a subscription owes without any use
    is for the computation to say.
    """
    # Not "$5 IS NULL OR …", which bounds no index scan: it would read on through all other tenants for the last few.
    bound = "" if through is None else "AND tenant_id <= $5"
    rows = await connection.fetch(
        f"""
        SELECT DISTINCT tenant_id FROM (
            (
                SELECT DISTINCT tenant_id FROM billing.pending_use
                WHERE org_id = $1 AND tenant_id > $2 {bound} AND period_end <= $3
                ORDER BY tenant_id LIMIT $4
            )
            UNION ALL
            (
                SELECT DISTINCT tenant_id FROM billing.subscription
                WHERE org_id = $1 AND tenant_id > $2 {bound} AND start_at <= $3
                ORDER BY tenant_id LIMIT $4
            )
        ) AS tenant
        ORDER BY tenant_id LIMIT $4
        """,
        org_id,
        after,
        period.end,
        limit,
        *(() if through is None else (through,)),
    )
    return [row["tenant_id"] for row in rows]


async def cut_pending_tenants(
    connection: Connection, org_id: OrgId, *, period: Period, after: str, size: int
) -> list[tuple[str, int]]:
    """All that `load_pending_tenants` would name behind `after`, by `size`: the last of each, and how many they are."""
    rows = await connection.fetch(
        """
        SELECT max(tenant_id) AS last_tenant, count(*) AS tenants
        FROM (
            SELECT tenant_id, (row_number() OVER (ORDER BY tenant_id) - 1) / $4 AS place
            FROM (
                SELECT tenant_id FROM billing.pending_use
                WHERE org_id = $1 AND tenant_id > $2 AND period_end <= $3
                UNION
                SELECT tenant_id FROM billing.subscription
                WHERE org_id = $1 AND tenant_id > $2 AND start_at <= $3
            ) AS tenant
        ) AS numbered
        GROUP BY place ORDER BY place
        """,
        org_id,
        after,
        period.end,
        size,
    )
    return [(row["last_tenant"], row["tenants"]) for row in rows]


async def load_uses(
    connection: Connection,
    org_id: OrgId,
    *,
    periods: Mapping[str, Period],
    standing: Collection[tuple[str, str, Period]],
    through_epoch: int,
) -> dict[str, list[PeriodUse]]:
    """By tenant, the uses up to its period that have uncovered snapshots, with what was billed of them.

    The tenants' accounts are locked: nobody covers or bills these uses meanwhile.

    Args:
        connection: In a transaction.
        org_id: Whose tenants they are.
        periods: Of each tenant the one that is invoiced.
        standing: Of tenant, event type and period: uses to be had as well, of 0 units where there are none.
        through_epoch: Snapshots up to this epoch count.
    """
    rows = await connection.fetch(
        """
        WITH subject AS (
            SELECT pending.tenant_id, pending.event_type, pending.period_start, pending.period_end
            FROM unnest($2::text[], $3::timestamptz[]) AS asked (tenant_id, period_start)
            CROSS JOIN LATERAL (
                SELECT tenant_id, event_type, period_start, period_end FROM billing.pending_use
                WHERE org_id = $1 AND tenant_id = asked.tenant_id AND period_start <= asked.period_start AND epoch <= $4
                OFFSET 0
            ) AS pending
            UNION
            SELECT * FROM unnest($5::text[], $6::text[], $7::timestamptz[], $8::timestamptz[])
        )
        SELECT subject.tenant_id, subject.event_type, subject.period_start, subject.period_end,
               coalesce(sum(snapshot.total), 0) AS quantity,
               array_agg(snapshot.snapshot_id ORDER BY snapshot.epoch, snapshot.day)
                   FILTER (WHERE snapshot.snapshot_id IS NOT NULL AND cover.invoice_id IS NULL) AS snapshot_ids
        FROM subject
        LEFT JOIN LATERAL (
            SELECT snapshot_id, epoch, day, total FROM billing.snapshot
            WHERE org_id = $1 AND tenant_id = subject.tenant_id AND event_type = subject.event_type
              AND day >= (subject.period_start AT TIME ZONE 'UTC')::date
              AND day < (subject.period_end AT TIME ZONE 'UTC')::date
              AND epoch <= $4
            OFFSET 0
        ) AS snapshot ON true
        LEFT JOIN LATERAL (
            SELECT invoice_id FROM billing.snapshot_cover
            WHERE org_id = $1 AND snapshot_id = snapshot.snapshot_id
            OFFSET 0
        ) AS cover ON true
        GROUP BY subject.tenant_id, subject.event_type, subject.period_start, subject.period_end
        """,
        org_id,
        list(periods),
        [period.start for period in periods.values()],
        through_epoch,
        [tenant_id for tenant_id, _, _ in standing],
        [event_type for _, event_type, _ in standing],
        [period.start for _, _, period in standing],
        [period.end for _, _, period in standing],
    )
    billed = await _load_billed(connection, org_id, {(row["tenant_id"], row["period_start"]) for row in rows})
    uses: dict[str, list[PeriodUse]] = {tenant_id: [] for tenant_id in periods}
    for row in rows:
        of_period = billed.get((row["tenant_id"], row["period_start"]), _BilledPeriod())
        uses[row["tenant_id"]].append(_use_from_row(row, of_period))
    return uses


@dataclass(slots=True)
class _BilledPeriod:
    """What was billed of a period's use, by event type, oldest first; the oldest lines pin prices and tax rate."""

    tax_rate: Decimal | None = None
    price_ids: dict[str, UUID] = field(default_factory=dict)
    lines: dict[str, list[BilledLine]] = field(default_factory=dict)


async def _load_billed(
    connection: Connection, org_id: OrgId, periods: Collection[tuple[str, datetime]]
) -> dict[tuple[str, datetime], _BilledPeriod]:
    rows = await connection.fetch(
        """
        SELECT asked.tenant_id, asked.period_start, line.event_type,
               line.invoice_id, line.line_id, line.amount, line.price_id, line.tax_rate
        FROM unnest($2::text[], $3::timestamptz[]) AS asked (tenant_id, period_start)
        CROSS JOIN LATERAL (
            SELECT event_type, invoice_id, line_id, amount, price_id, tax_rate FROM billing.invoice_line
            WHERE org_id = $1 AND tenant_id = asked.tenant_id AND period_start = asked.period_start
              AND event_type IS NOT NULL
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
        [tenant_id for tenant_id, _ in periods],
        [start for _, start in periods],
    )
    billed: dict[tuple[str, datetime], _BilledPeriod] = {}
    for row in rows:
        event_type = row["event_type"]
        of_period = billed.setdefault((row["tenant_id"], row["period_start"]), _BilledPeriod(row["tax_rate"]))
        of_period.price_ids.setdefault(event_type, row["price_id"])
        line = BilledLine(row["invoice_id"], row["line_id"], row["amount"])
        of_period.lines.setdefault(event_type, []).append(line)
    return billed


async def load_snapshots(connection: Connection, org_id: OrgId, snapshot_ids: Sequence[UUID]) -> dict[UUID, Snapshot]:
    """The snapshots with these ids."""
    rows = await connection.fetch(
        """
        SELECT snapshot_id, epoch, tenant_id, event_type, day, entry_count, total, root
        FROM billing.snapshot WHERE org_id = $1 AND snapshot_id = ANY($2::uuid[])
        """,
        org_id,
        snapshot_ids,
    )
    return {row["snapshot_id"]: Snapshot(**row) for row in rows}


def _use_from_row(row: asyncpg.Record, billed: _BilledPeriod) -> PeriodUse:
    return PeriodUse(
        event_type=row["event_type"],
        period=Period(row["period_start"], row["period_end"]),
        quantity=row["quantity"],
        snapshot_ids=tuple(row["snapshot_ids"] or ()),
        billed=tuple(billed.lines.get(row["event_type"], ())),
        pinned_price_id=billed.price_ids.get(row["event_type"]),
        pinned_tax_rate=billed.tax_rate,
    )
