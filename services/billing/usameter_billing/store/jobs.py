"""Jobs of bulk generation: claimed under a lease, advanced in the transactions that do the work."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_core.errors import UsameterError
from usameter_core.ids import OrgId, new_uuid
from usameter_core.period import Period

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

# A batch takes well under a second, and each renews the lease; a killed worker's job goes on after this.
LEASE = timedelta(seconds=15)

_COLUMNS = """org_id, job_id, period_start, period_end, finalize, state, done, total, problems, after_tenant,
    failures, lease_id"""


class JobState(StrEnum):
    """The names are those of usameter/common/v1/job.proto."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Job:
    """A bulk run. Whoever holds the lease saves its next state with the work that it describes."""

    org_id: OrgId
    job_id: UUID
    period: Period
    finalize: bool
    state: JobState
    done: int = 0
    total: int | None = None
    problems: tuple[str, ...] = ()
    after_tenant: str = ""
    failures: int = 0
    lease_id: UUID | None = None


class LeaseLost(UsameterError):
    """Another worker has taken the job over; what this one was doing must not be committed."""


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
    """The job, as of its last committed batch."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM billing.job WHERE org_id = $1 AND job_id = $2", org_id, job_id
    )
    return None if row is None else job_from_row(row)


async def claim_job(connection: Connection) -> Job | None:
    """The job, of any organization, that has waited longest; it is ours for `LEASE`."""
    row = await connection.fetchrow(
        f"""
        UPDATE billing.job SET lease_id = $1, lease_until = now() + $2
        WHERE (org_id, job_id) = (
            SELECT org_id, job_id FROM billing.job
            WHERE state = 'running' AND lease_until <= now()
            ORDER BY lease_until LIMIT 1 FOR UPDATE SKIP LOCKED
        )
        RETURNING {_COLUMNS}
        """,
        new_uuid(),
        LEASE,
    )
    return None if row is None else job_from_row(row)


async def save_job(connection: Connection, job: Job, *, lease: timedelta = LEASE) -> None:
    """Store how far the job is; nobody else claims it for `lease`.

    Raises:
        LeaseLost: It is somebody else's by now.
    """
    saved = await connection.fetchval(
        """
        UPDATE billing.job
        SET state = $4, done = $5, total = $6, problems = $7, after_tenant = $8, failures = $9,
            lease_until = now() + $10
        WHERE org_id = $1 AND job_id = $2 AND lease_id = $3
        RETURNING true
        """,
        job.org_id,
        job.job_id,
        job.lease_id,
        job.state,
        job.done,
        job.total,
        job.problems,
        job.after_tenant,
        job.failures,
        lease,
    )
    if not saved:
        raise LeaseLost("another worker has taken the job over")


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
        after_tenant=row["after_tenant"],
        failures=row["failures"],
        lease_id=row["lease_id"],
    )
