"""Plans with their prices: added, never changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
import msgspec

from usameter_billing.domain.plan import Plan, PlanInterval
from usameter_billing.store.prices import PRICE_COLUMNS, price_from_row
from usameter_core.ids import OrgId
from usameter_proof.pricing import PriceVersion

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

_COLUMNS = "plan_id, name, base_fee, currency, interval, created_at"


async def insert_plans(connection: Connection, org_id: OrgId, plans: Sequence[Plan]) -> set[UUID]:
    """Add those plans whose names the organization does not have yet; answers with their ids."""
    rows = await connection.fetch(
        """
        INSERT INTO billing.plan (org_id, plan_id, name, base_fee, currency, interval, created_at)
        SELECT $1, * FROM unnest($2::uuid[], $3::text[], $4::numeric[], $5::text[], $6::text[], $7::timestamptz[])
        ON CONFLICT ON CONSTRAINT plan_name_key DO NOTHING
        RETURNING plan_id
        """,
        org_id,
        [plan.plan_id for plan in plans],
        [plan.name for plan in plans],
        [plan.base_fee for plan in plans],
        [plan.currency for plan in plans],
        [plan.interval.value for plan in plans],
        [plan.created_at for plan in plans],
    )
    added = {row["plan_id"] for row in rows}
    prices = [price for plan in plans if plan.plan_id in added for price in plan.prices]
    await connection.execute(
        """
        INSERT INTO billing.price
            (org_id, price_id, event_type, tenant_id, effective_from, terms, created_at, plan_id)
        SELECT $1, price_id, event_type, '', effective_from, terms, created_at, plan_id
        FROM unnest($2::uuid[], $3::text[], $4::timestamptz[], $5::jsonb[], $6::timestamptz[], $7::uuid[])
            AS price (price_id, event_type, effective_from, terms, created_at, plan_id)
        """,
        org_id,
        [price.price_id for price in prices],
        [price.event_type for price in prices],
        [price.effective_from for price in prices],
        [msgspec.json.encode(price.terms).decode() for price in prices],
        [price.created_at for price in prices],
        [price.plan_id for price in prices],
    )
    return added


async def find_plan_id(connection: Connection, org_id: OrgId, *, name: str) -> UUID | None:
    """The plan of that name."""
    plan_id: UUID | None = await connection.fetchval(
        "SELECT plan_id FROM billing.plan WHERE org_id = $1 AND name = $2", org_id, name
    )
    return plan_id


async def load_plans(connection: Connection, org_id: OrgId, plan_ids: Iterable[UUID]) -> dict[UUID, Plan]:
    """The plans with these ids, as far as there are any."""
    wanted = sorted(set(plan_ids))
    if not wanted:
        return {}
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM billing.plan WHERE org_id = $1 AND plan_id = ANY($2::uuid[])", org_id, wanted
    )
    return {plan.plan_id: plan for plan in await _with_prices(connection, org_id, rows)}


async def list_plans(connection: Connection, org_id: OrgId, *, after: str, limit: int) -> list[Plan]:
    """At most `limit` plans by name, ascending."""
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM billing.plan WHERE org_id = $1 AND name > $2 ORDER BY name LIMIT $3",
        org_id,
        after,
        limit,
    )
    return await _with_prices(connection, org_id, rows)


async def _with_prices(connection: Connection, org_id: OrgId, rows: Sequence[asyncpg.Record]) -> list[Plan]:
    found = await connection.fetch(
        f"""
        SELECT {PRICE_COLUMNS} FROM billing.price
        WHERE org_id = $1 AND plan_id = ANY($2::uuid[]) ORDER BY event_type
        """,
        org_id,
        [row["plan_id"] for row in rows],
    )
    prices: dict[UUID, list[PriceVersion]] = {row["plan_id"]: [] for row in rows}
    for row in found:
        prices[row["plan_id"]].append(price_from_row(row))
    return [_plan_from_row(row, prices[row["plan_id"]]) for row in rows]


def _plan_from_row(row: asyncpg.Record, prices: Sequence[PriceVersion]) -> Plan:
    return Plan(
        plan_id=row["plan_id"],
        name=row["name"],
        base_fee=row["base_fee"],
        currency=row["currency"],
        interval=PlanInterval(row["interval"]),
        prices=tuple(prices),
        created_at=row["created_at"],
    )
