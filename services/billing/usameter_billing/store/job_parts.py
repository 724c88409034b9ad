"""Parts of bulk runs: whoever bills tenants of one holds its row locked, and advances it in the same transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_billing.domain.job import PROBLEMS_MAX, GivingUp, Part, PartState, Retry
from usameter_core.ids import OrgId
from usameter_core.period import Period

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection


async def insert_parts(
    connection: Connection, org_id: OrgId, job_id: UUID, *, after_tenant: str, last_tenants: Sequence[str]
) -> None:
    """Add open parts that end with these tenants, ascending, but for the last, which goes on to the end."""
    await connection.execute(
        """
        INSERT INTO billing.job_part
            (org_id, job_id, part, after_tenant, through_tenant, state, done, problems, given_up, failures,
             attempt_after)
        SELECT $1, $2, part, after_tenant, through_tenant, 'open', 0, '{}', '{}', 0, now()
        FROM unnest($3::text[], $4::text[]) WITH ORDINALITY AS new (after_tenant, through_tenant, part)
        """,
        org_id,
        job_id,
        [after_tenant, *last_tenants[:-1]] if last_tenants else [],
        [*last_tenants[:-1], None] if last_tenants else [],
    )


async def claim_part(connection: Connection) -> Part | None:
    """An open part, of any organization, that nobody works on; its row is locked to the end of the transaction.

    By number first: a run that has had less goes before one that has had more, so that a small one
    does not wait for a large one to end.
    """
    row = await connection.fetchrow(
        """
        WITH claimed AS MATERIALIZED (
            SELECT org_id, job_id, part, after_tenant, through_tenant, state, problems, given_up, failures, alone_tenant
            FROM billing.job_part
            WHERE state = 'open' AND attempt_after <= now()
            ORDER BY part, attempt_after LIMIT 1 FOR UPDATE SKIP LOCKED
        )
        SELECT claimed.*, job.*
        FROM claimed
        CROSS JOIN LATERAL (
            SELECT period_start, period_end, finalize, seller_name FROM billing.job
            WHERE org_id = claimed.org_id AND job_id = claimed.job_id
            OFFSET 0
        ) AS job
        """
    )
    return None if row is None else part_from_row(row)


async def save_part(connection: Connection, part: Part, *, tenants: int) -> None:
    """Store how far the claimed part is, after so many more tenants."""
    await connection.execute(
        """
        UPDATE billing.job_part
        SET state = $4, after_tenant = $5, done = done + $6, problems = $7, failures = 0, alone_tenant = NULL,
            attempt_after = now()
        WHERE org_id = $1 AND job_id = $2 AND part = $3
        """,
        part.org_id,
        part.job_id,
        part.number,
        part.state,
        part.after_tenant,
        tenants,
        part.problems,
    )


async def record_failure(connection: Connection, part: Part, retry: Retry) -> None:
    """An attempt at the part failed, and is made again later.

    Nothing happens where the part has moved on since it was claimed, or the attempt of somebody else failed as well.
    """
    await connection.execute(
        """
        UPDATE billing.job_part SET failures = $6, alone_tenant = $7, attempt_after = now() + $8
        WHERE org_id = $1 AND job_id = $2 AND part = $3 AND state = 'open' AND after_tenant = $4 AND failures = $5
        """,
        part.org_id,
        part.job_id,
        part.number,
        part.after_tenant,
        part.failures,
        retry.failures,
        retry.alone_tenant,
        retry.after,
    )


async def give_up_tenant(connection: Connection, part: Part, giving_up: GivingUp, problem: str) -> bool:
    """Move the part past the tenant that the failed attempt held alone, and say why.

    False, and nothing happens, where the part has moved on since it was claimed, or the attempt of somebody else
    failed as well.
    """
    number = await connection.fetchval(
        """
        UPDATE billing.job_part
        SET given_up = (array_append(given_up, $6))[1:$7], after_tenant = $8, state = $9, failures = $10,
            alone_tenant = NULL, attempt_after = now()
        WHERE org_id = $1 AND job_id = $2 AND part = $3 AND state = 'open' AND after_tenant = $4 AND failures = $5
        RETURNING part
        """,
        part.org_id,
        part.job_id,
        part.number,
        part.after_tenant,
        part.failures,
        problem,
        PROBLEMS_MAX,
        giving_up.tenant_id,
        giving_up.state,
        giving_up.failures,
    )
    return number is not None


def part_from_row(row: asyncpg.Record) -> Part:
    """The part in a row, with what it needs of its job."""
    return Part(
        org_id=row["org_id"],
        job_id=row["job_id"],
        number=row["part"],
        period=Period(row["period_start"], row["period_end"]),
        finalize=row["finalize"],
        seller_name=row["seller_name"],
        after_tenant=row["after_tenant"],
        through_tenant=row["through_tenant"],
        state=PartState(row["state"]),
        problems=tuple(row["problems"]),
        given_up=tuple(row["given_up"]),
        failures=row["failures"],
        alone_tenant=row["alone_tenant"],
    )
