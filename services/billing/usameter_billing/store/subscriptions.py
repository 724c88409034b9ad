"""Subscriptions and their phases; whoever writes has locked the tenant's account and the ledger's cursor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_billing.domain.plan import Plan
from usameter_billing.domain.subscription import Phase, Subscription
from usameter_billing.store.plans import load_plans
from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

_COLUMNS = "subscription_id, tenant_id, start_at, end_at, created_at"


async def save_subscription(connection: Connection, org_id: OrgId, subscription: Subscription) -> None:
    """Write a subscription, new or known, with its phases as they are now.

    Raises:
        asyncpg.ExclusionViolationError: Another of the tenant's covers a part of its time.
    """
    await connection.execute(
        """
        INSERT INTO billing.subscription (org_id, subscription_id, tenant_id, start_at, end_at, created_at)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT ON CONSTRAINT subscription_pkey DO UPDATE SET end_at = excluded.end_at
        """,
        org_id,
        subscription.subscription_id,
        subscription.tenant_id,
        subscription.start,
        subscription.end,
        subscription.created_at,
    )
    await connection.execute(
        "DELETE FROM billing.subscription_phase WHERE org_id = $1 AND subscription_id = $2",
        org_id,
        subscription.subscription_id,
    )
    await connection.execute(
        """
        INSERT INTO billing.subscription_phase (org_id, subscription_id, start_at, plan_id)
        SELECT $1, $2, * FROM unnest($3::timestamptz[], $4::uuid[])
        """,
        org_id,
        subscription.subscription_id,
        [phase.start for phase in subscription.phases],
        [phase.plan.plan_id for phase in subscription.phases],
    )


async def load_subscription(connection: Connection, org_id: OrgId, subscription_id: UUID) -> Subscription | None:
    """The subscription with this id."""
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM billing.subscription WHERE org_id = $1 AND subscription_id = $2",
        org_id,
        subscription_id,
    )
    return next(iter(await _with_phases(connection, org_id, rows)), None)


async def load_subscriptions(
    connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]
) -> dict[str, tuple[Subscription, ...]]:
    """All that these tenants have or had, by tenant, ascending; a tenant without any is not in it."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM billing.subscription
        WHERE org_id = $1 AND tenant_id = ANY($2::text[]) ORDER BY start_at, subscription_id
        """,
        org_id,
        tenant_ids,
    )
    found: dict[str, tuple[Subscription, ...]] = {}
    for subscription in await _with_phases(connection, org_id, rows):
        found[subscription.tenant_id] = (*found.get(subscription.tenant_id, ()), subscription)
    return found


async def list_subscriptions(
    connection: Connection, org_id: OrgId, *, tenant_id: str, before: UUID | None, limit: int
) -> list[Subscription]:
    """At most `limit` subscriptions, newest first; an empty filter passes all."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM billing.subscription
        WHERE org_id = $1 AND ($2 = '' OR tenant_id = $2) AND ($3::uuid IS NULL OR subscription_id < $3)
        ORDER BY subscription_id DESC LIMIT $4
        """,
        org_id,
        tenant_id,
        before,
        limit,
    )
    return await _with_phases(connection, org_id, rows)


async def _with_phases(connection: Connection, org_id: OrgId, rows: Sequence[asyncpg.Record]) -> list[Subscription]:
    if not rows:
        return []
    found = await connection.fetch(
        """
        SELECT subscription_id, start_at, plan_id FROM billing.subscription_phase
        WHERE org_id = $1 AND subscription_id = ANY($2::uuid[]) ORDER BY start_at
        """,
        org_id,
        [row["subscription_id"] for row in rows],
    )
    plans = await load_plans(connection, org_id, [row["plan_id"] for row in found])
    phases: dict[UUID, list[Phase]] = {row["subscription_id"]: [] for row in rows}
    for row in found:
        phases[row["subscription_id"]].append(_phase_from_row(row, plans))
    return [_subscription_from_row(row, phases[row["subscription_id"]]) for row in rows]


def _phase_from_row(row: asyncpg.Record, plans: dict[UUID, Plan]) -> Phase:
    return Phase(row["start_at"], plans[row["plan_id"]])


def _subscription_from_row(row: asyncpg.Record, phases: Sequence[Phase]) -> Subscription:
    return Subscription(
        subscription_id=row["subscription_id"],
        tenant_id=row["tenant_id"],
        start=row["start_at"],
        end=row["end_at"],
        phases=tuple(phases),
        created_at=row["created_at"],
    )
