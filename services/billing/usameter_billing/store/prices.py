"""Price versions: added, never changed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import asyncpg
import msgspec

from usameter_core.errors import AlreadyExists, Internal, InvalidArgument
from usameter_core.ids import OrgId, format_id
from usameter_core.period import format_timestamp
from usameter_proof.pricing import PriceTerms, PriceVersion, price_from_terms

if TYPE_CHECKING:
    from uuid import UUID

    from usameter_core.postgres.pool import Connection

PRICE_COLUMNS = "price_id, event_type, tenant_id, effective_from, terms, created_at, plan_id"


async def insert_price(connection: Connection, org_id: OrgId, version: PriceVersion) -> None:
    """Add a version.

    Raises:
        AlreadyExists: One stands for the same event type and tenant at the same moment.
    """
    tenant_id = version.tenant_id or ""
    row = await connection.fetchrow(
        """
        WITH added AS (
            INSERT INTO billing.price (org_id, price_id, event_type, tenant_id, effective_from, terms, created_at)
            VALUES ($1, $2, $3, $4, $5, $6, $7)
            ON CONFLICT (org_id, event_type, tenant_id, effective_from) WHERE plan_id IS NULL DO NOTHING
            RETURNING price_id
        )
        SELECT price_id FROM added
        """,
        org_id,
        version.price_id,
        version.event_type,
        tenant_id,
        version.effective_from,
        msgspec.json.encode(version.terms).decode(),
        version.created_at,
    )
    if row is None:
        existing = await connection.fetchval(
            """
            SELECT price_id FROM billing.price
            WHERE org_id = $1 AND event_type = $2 AND tenant_id = $3 AND effective_from = $4 AND plan_id IS NULL
            """,
            org_id,
            version.event_type,
            tenant_id,
            version.effective_from,
        )
        raise AlreadyExists(
            "price",
            format_id("prc", existing),
            f"A price of {version.event_type} from {format_timestamp(version.effective_from)} exists already; "
            "versions are not edited, add one with another effective_from",
        )


async def load_prices(
    connection: Connection, org_id: OrgId, *, event_types: Sequence[str], tenant_ids: Sequence[str]
) -> list[PriceVersion]:
    """Every version of the event types, for all tenants and for these; not those of plans."""
    rows = await connection.fetch(
        f"""
        SELECT {PRICE_COLUMNS} FROM billing.price
        WHERE org_id = $1 AND event_type = ANY($2::text[]) AND tenant_id = ANY($3::text[]) AND plan_id IS NULL
        """,
        org_id,
        event_types,
        ["", *tenant_ids],
    )
    return [price_from_row(row) for row in rows]


async def load_prices_by_id(
    connection: Connection, org_id: OrgId, price_ids: Sequence[UUID]
) -> dict[UUID, PriceVersion]:
    """The versions with these ids."""
    rows = await connection.fetch(
        f"SELECT {PRICE_COLUMNS} FROM billing.price WHERE org_id = $1 AND price_id = ANY($2::uuid[])",
        org_id,
        price_ids,
    )
    return {row["price_id"]: price_from_row(row) for row in rows}


async def list_prices(
    connection: Connection,
    org_id: OrgId,
    *,
    event_type: str,
    tenant_id: str,
    after: tuple[str, str, datetime] | None,
    limit: int,
) -> list[PriceVersion]:
    """At most `limit` versions by (event_type, tenant_id, effective_from), ascending; not those of plans.

    Empty filters pass all.
    """
    after_type, after_tenant, after_moment = after or ("", "", None)
    rows = await connection.fetch(
        f"""
        SELECT {PRICE_COLUMNS} FROM billing.price
        WHERE org_id = $1 AND plan_id IS NULL AND ($2 = '' OR event_type = $2) AND ($3 = '' OR tenant_id = $3)
          AND ($6::timestamptz IS NULL OR (event_type, tenant_id, effective_from) > ($4, $5, $6))
        ORDER BY event_type, tenant_id, effective_from
        LIMIT $7
        """,
        org_id,
        event_type,
        tenant_id,
        after_type,
        after_tenant,
        after_moment,
        limit,
    )
    return [price_from_row(row) for row in rows]


async def count_pinned(connection: Connection, org_id: OrgId, version: PriceVersion) -> tuple[int, datetime | None]:
    """How many tenants' billed periods would be priced by `version` but keep another; and the first's start."""
    row = await connection.fetchrow(
        """
        SELECT count(DISTINCT (line.tenant_id, line.period_start)) AS periods, min(line.period_start) AS first_start
        FROM billing.invoice_line AS line
        JOIN billing.invoice AS invoice USING (org_id, invoice_id)
        JOIN billing.price AS pinned USING (org_id, price_id)
        WHERE pinned.plan_id IS NULL AND line.org_id = $1 AND line.event_type = $2 AND line.period_start >= $4
          AND ($3 = '' OR line.tenant_id = $3) AND invoice.status <> 'void'
          AND line.period_start < coalesce((
              SELECT min(later.effective_from) FROM billing.price AS later
              WHERE later.org_id = $1 AND later.event_type = $2 AND later.tenant_id = $3
                AND later.plan_id IS NULL AND later.effective_from > $4
          ), 'infinity')
          AND ($3 <> '' OR NOT EXISTS (
              SELECT FROM billing.price AS own
              WHERE own.org_id = $1 AND own.event_type = $2 AND own.tenant_id = line.tenant_id
                AND own.plan_id IS NULL AND own.effective_from <= line.period_start
          ))
        """,
        org_id,
        version.event_type,
        version.tenant_id or "",
        version.effective_from,
    )
    assert row is not None
    return row["periods"], row["first_start"]


def price_from_row(row: asyncpg.Record) -> PriceVersion:
    """The version in a row; its terms were checked when they were written.

    Raises:
        Internal: They describe no price: somebody has changed them since, and it is not for the caller to mend.
    """
    try:
        terms = msgspec.json.decode(row["terms"], type=PriceTerms)
        price = price_from_terms(terms)
    except (InvalidArgument, msgspec.ValidationError) as error:
        raise Internal(f"the stored terms of {format_id('prc', row['price_id'])} are no price: {error}") from error
    return PriceVersion(
        price_id=row["price_id"],
        event_type=row["event_type"],
        tenant_id=row["tenant_id"] or None,
        effective_from=row["effective_from"],
        terms=terms,
        price=price,
        created_at=row["created_at"],
        plan_id=row["plan_id"],
    )
