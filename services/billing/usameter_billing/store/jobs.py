"""Jobs of bulk generation: claimed under a lease to be cut into parts, ended when no part is open."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_billing.domain.job import PROBLEMS_MAX, Job, JobState
from usameter_core.ids import OrgId, new_uuid
from usameter_core.period import Period

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

# Most pulls take less. One that outlasts it may be made twice, which is a waste and no more.
LEASE = timedelta(seconds=15)


def _gathered(column: str) -> str:
    """The first $3 texts in an array that each part of the job $1, $2 has: of its first $3 parts that have any."""
    return f"""
        ARRAY(
            SELECT problem
            FROM (
                SELECT part, {column} FROM billing.job_part
                WHERE org_id = $1 AND job_id = $2 AND {column} <> '{{}}'
                ORDER BY part LIMIT $3
            ) AS with_problems
            CROSS JOIN LATERAL unnest({column}) WITH ORDINALITY AS found (problem, place)
            ORDER BY part, place LIMIT $3
        )
    """


# What the parts of the job $1, $2 come to, with at most $3 problems of either kind.
_PARTS = f"""
    SELECT coalesce((SELECT sum(done) FROM billing.job_part WHERE org_id = $1 AND job_id = $2), 0)::bigint AS done,
           {_gathered("given_up")} AS given_up,
           {_gathered("problems")} AS problems
"""
# As of the last batch that was committed; the job's own are what older code did that billed without parts.
_DONE = "job.done + parts.done"
_PROBLEMS = "(parts.given_up || job.problems || parts.problems)[1:$3]"


async def insert_job(connection: Connection, job: Job) -> None:
    """Add a job that any worker may claim at once."""
    await connection.execute(
        """
        INSERT INTO billing.job
            (org_id, job_id, period_start, period_end, finalize, state, done, problems, after_tenant, failures,
             lease_until, created_at)
        VALUES ($1, $2, $3, $4, $5, $6, 0, '{}', '', 0, now(), now())
        """,
        job.org_id,
        job.job_id,
        job.period.start,
        job.period.end,
        job.finalize,
        job.state,
    )


async def load_job(connection: Connection, org_id: OrgId, job_id: UUID) -> Job | None:
    """The job, as of the last committed batches of its parts."""
    row = await connection.fetchrow(
        f"""
        SELECT org_id, job_id, period_start, period_end, finalize, state, {_DONE} AS done,
               CASE WHEN total IS NOT NULL THEN greatest(total, {_DONE}) END AS total, {_PROBLEMS} AS problems,
               job.failures, lease_id
        FROM billing.job AS job CROSS JOIN ({_PARTS}) AS parts
        WHERE org_id = $1 AND job_id = $2
        """,
        org_id,
        job_id,
        PROBLEMS_MAX,
    )
    return None if row is None else job_from_row(row)


async def claim_job(connection: Connection) -> Job | None:
    """The job, of any organization, that has waited longest to be cut into parts; for `LEASE` nobody else gets it."""
    row = await connection.fetchrow(
        """
        UPDATE billing.job SET lease_id = $1, lease_until = now() + $2
        WHERE (org_id, job_id) = (
            SELECT org_id, job_id FROM billing.job
            WHERE state = 'running' AND lease_until <= now()
            ORDER BY lease_until LIMIT 1 FOR UPDATE SKIP LOCKED
        )
        RETURNING org_id, job_id, period_start, period_end, finalize, state, done, total, problems, failures, lease_id
        """,
        new_uuid(),
        LEASE,
    )
    return None if row is None else job_from_row(row)


async def record_failure(connection: Connection, job: Job, problem: str, *, retry_after: timedelta | None) -> None:
    """The claimed job could not be cut into parts: it is tried again, or has failed where `retry_after` is None.

    Nothing happens where somebody else has claimed or cut it meanwhile.
    """
    await connection.execute(
        """
        UPDATE billing.job
        SET failures = failures + 1, lease_until = now() + coalesce($4::interval, '0'),
            state = CASE WHEN $4::interval IS NULL THEN 'failed' ELSE state END,
            problems = CASE WHEN $4::interval IS NULL THEN (ARRAY[$5] || problems)[1:$6] ELSE problems END
        WHERE org_id = $1 AND job_id = $2 AND lease_id = $3 AND state = 'running'
        """,
        job.org_id,
        job.job_id,
        job.lease_id,
        retry_after,
        problem,
        PROBLEMS_MAX,
    )


async def load_cuttable(connection: Connection, org_id: OrgId, job_id: UUID) -> str | None:
    """Lock a job that is to be cut into parts; the tenant behind which they begin. None: it is cut, or has ended."""
    after_tenant: str | None = await connection.fetchval(
        """
        SELECT after_tenant FROM billing.job
        WHERE org_id = $1 AND job_id = $2 AND state = 'running' AND lease_until < 'infinity' FOR UPDATE
        """,
        org_id,
        job_id,
    )
    return after_tenant


async def save_cut(connection: Connection, org_id: OrgId, job_id: UUID, *, seller_name: str, tenants: int) -> None:
    """The locked job is cut into parts of so many tenants: nobody claims it any more.

    A worker of older code that still has a lease of it loses that.
    """
    await connection.execute(
        """
        UPDATE billing.job
        SET seller_name = $3, total = done + $4, lease_id = NULL, lease_until = 'infinity'
        WHERE org_id = $1 AND job_id = $2
        """,
        org_id,
        job_id,
        seller_name,
        tenants,
    )


async def end_job(connection: Connection, org_id: OrgId, job_id: UUID) -> JobState | None:
    """End the job if it is cut and none of its parts is open, and delete the parts; None: there was nothing to end.

    Twice, or twice at once, is harmless: parts are never added and never opened again, and of two that end it the
    second finds it ended.
    """
    state: str | None = await connection.fetchval(
        f"""
        WITH ended AS (
            UPDATE billing.job AS job
            SET state = CASE WHEN parts.given_up = '{{}}' THEN 'succeeded' ELSE 'failed' END,
                done = {_DONE}, problems = {_PROBLEMS},
                -- Whom others have billed meanwhile is not missing.
                total = CASE WHEN parts.given_up = '{{}}' THEN {_DONE} ELSE greatest(total, {_DONE}) END
            FROM ({_PARTS}) AS parts
            WHERE job.org_id = $1 AND job.job_id = $2 AND job.state = 'running' AND job.lease_until = 'infinity'
              AND NOT EXISTS (
                  SELECT FROM billing.job_part WHERE org_id = $1 AND job_id = $2 AND state = 'open'
              )
            RETURNING job.state
        ), deleted AS (
            DELETE FROM billing.job_part WHERE org_id = $1 AND job_id = $2 AND EXISTS (SELECT FROM ended)
        )
        SELECT state FROM ended
        """,
        org_id,
        job_id,
        PROBLEMS_MAX,
    )
    return None if state is None else JobState(state)


async def find_finished_jobs(connection: Connection) -> list[tuple[OrgId, UUID]]:
    """Jobs of all organizations that nobody has ended although no part of them is open."""
    rows = await connection.fetch(
        """
        SELECT org_id, job_id FROM billing.job AS job
        WHERE state = 'running' AND lease_until = 'infinity' AND NOT EXISTS (
            SELECT FROM billing.job_part WHERE org_id = job.org_id AND job_id = job.job_id AND state = 'open'
        )
        """
    )
    return [(row["org_id"], row["job_id"]) for row in rows]


def job_from_row(row: asyncpg.Record) -> Job:
    """The job in a row."""
    return Job(
        org_id=row["org_id"],
        job_id=row["job_id"],
        period=Period(row["period_start"], row["period_end"]),
        finalize=row["finalize"],
        state=JobState(row["state"]),
        done=row["done"],
        total=row["total"],
        problems=tuple(row["problems"]),
        failures=row["failures"],
        lease_id=row["lease_id"],
    )
