"""Bulk generation: every tenant of an organization, in batches, restartable at any point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.clients import OrganizationClient
from usameter_billing.domain.invoicing import Assessment
from usameter_billing.domain.tiling import Tiling
from usameter_billing.service import generation
from usameter_billing.service.invoices import check_period
from usameter_billing.service.ledger import LedgerPull
from usameter_billing.store import jobs as store
from usameter_billing.store import ledger
from usameter_billing.store.jobs import Job, JobState
from usameter_core.clock import Clock
from usameter_core.errors import FieldViolation, InvalidArgument, NotFound, UsameterError
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.logging import get_logger
from usameter_core.period import Period, format_timestamp
from usameter_core.postgres.transaction import run_transaction
from usameter_core.tasks import Doorbell

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

log = get_logger()

# The cost of a transaction is spread over this many; others wait for its numbers that long.
BATCH_TENANTS = 200
PROBLEMS_MAX = 100
# After 1, 2, 4, 8, 16 seconds and then every 32: five minutes of a dependency that is away. Then the job says
# so and ends.
_FAILURES_MAX = 15
_RETRY_AFTER_MAX = timedelta(seconds=32)


class BulkJobs:
    """Starts, runs and shows bulk runs.

    Each batch bills its tenants and advances the job in one transaction, under the lease of the
    job: after a crash the next worker goes on exactly there, and two workers never both commit.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        clock: Clock,
        ledger: LedgerPull,
        organizations: OrganizationClient,
        due: timedelta,
        started: Doorbell,
        marks: Doorbell,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._ledger = ledger
        self._organizations = organizations
        self._due = due
        self._started = started
        self._marks = marks

    async def start(self, org_id: OrgId, *, bounds: Period, finalize: bool) -> Job:
        """Record a run over all tenants with use that was not billed, or subscribed; a worker takes it from here.

        It is of a calendar month, and invoices of each tenant the last billing period that ends in it.

        Raises:
            InvalidArgument: The bounds are no calendar month, or one that has not begun, or
                `finalize` is asked of one that has not ended.
        """
        now = self._clock.now()
        month = check_period(bounds, tiling=Tiling(), now=now)
        if finalize and month.end > now:
            until = format_timestamp(month.end)
            description = f"the period has not ended: only drafts can be made of it until {until}"
            raise InvalidArgument([FieldViolation("finalize", description)])
        job = Job(org_id, new_uuid(), month, finalize, JobState.RUNNING)
        await run_transaction(self._pool, lambda connection: store.insert_job(connection, job))
        self._started.ring()
        return job

    async def get(self, org_id: OrgId, job_id: UUID) -> Job:
        """The job as of its last batch.

        Raises:
            NotFound: The organization has no such job.
        """
        job = await run_transaction(self._pool, lambda connection: store.load_job(connection, org_id, job_id))
        if job is None:
            raise NotFound("job", format_id("job", job_id))
        return job

    async def run_waiting(self) -> None:
        """Run the jobs that nobody works on, one after another, each to its end.

        A job that fails as a whole is tried again later, and ends as failed after `_FAILURES_MAX`.
        """
        while job := await run_transaction(self._pool, store.claim_job):
            try:
                await self._run(job)
            except store.LeaseLost:
                log.warning("job_lease_lost", job_id=format_id("job", job.job_id))
            except Exception as error:
                # The top of the job: one that cannot be run must not stop the loop that runs the others.
                await self._postpone(job.org_id, job.job_id, lease_id=job.lease_id, error=error)

    async def _run(self, job: Job) -> None:
        # A pull that outlasts the lease loses it. What has arrived is kept, so the next is shorter.
        await self._ledger.pull(job.org_id)
        seller_name = await self._organizations.read_name(job.org_id)
        if job.total is None:
            job = await run_transaction(self._pool, partial(_count_tenants, job=job))
        while job.state is JobState.RUNNING:
            job = await run_transaction(self._pool, partial(self._run_batch, job=job, seller_name=seller_name))
            self._marks.ring()
        log.info("bulk_generation_ended", job_id=format_id("job", job.job_id), tenants=job.done)

    async def _run_batch(self, connection: Connection, job: Job, seller_name: str) -> Job:
        tenant_ids = await ledger.load_pending_tenants(
            connection, job.org_id, period=job.period, after=job.after_tenant, limit=BATCH_TENANTS
        )
        if not tenant_ids:
            ended = replace(job, state=JobState.SUCCEEDED, total=job.done)
            await store.save_job(connection, ended)
            return ended
        due = await generation.assess(
            connection, job.org_id, tenant_ids=tenant_ids, period_of=lambda tiling: tiling.last_ended(job.period.end)
        )
        done = job.done + len(tenant_ids)
        advanced = replace(
            job,
            done=done,
            total=max(done, job.total or 0),
            after_tenant=tenant_ids[-1],
            problems=_add_problems(job.problems, due.assessments),
            failures=0,
        )
        # Before the invoices, whose numbers are locked last; also, a lost lease then costs nothing.
        await store.save_job(connection, advanced)
        if job.finalize:
            now = self._clock.now()
            await generation.finalize(
                connection, due, due.invoices, issued_at=now, default_due=self._due, seller_name=seller_name
            )
        else:
            await generation.save_drafts(connection, due)
        return advanced

    async def _postpone(self, org_id: OrgId, job_id: UUID, *, lease_id: UUID | None, error: Exception) -> None:
        sentence = str(error) if isinstance(error, UsameterError) else "Internal error"
        log.error("bulk_generation_failed", job_id=format_id("job", job_id), exc_info=error)

        async def work(connection: Connection) -> None:
            job = await store.load_job(connection, org_id, job_id)
            if job is None or job.lease_id != lease_id:
                return
            failures = job.failures + 1
            if failures < _FAILURES_MAX:
                retry_after = min(timedelta(seconds=2**job.failures), _RETRY_AFTER_MAX)
                await store.save_job(connection, replace(job, failures=failures), lease=retry_after)
            else:
                problems = (sentence, *job.problems)[:PROBLEMS_MAX]
                failed = replace(job, state=JobState.FAILED, failures=failures, problems=problems)
                await store.save_job(connection, failed)

        await run_transaction(self._pool, work)


async def _count_tenants(connection: Connection, *, job: Job) -> Job:
    total = await ledger.count_pending_tenants(connection, job.org_id, period=job.period)
    counted = replace(job, total=total)
    await store.save_job(connection, counted)
    return counted


def _add_problems(problems: tuple[str, ...], assessments: Iterable[Assessment]) -> tuple[str, ...]:
    found = [
        f"{assessment.tenant_id}: no price of {use.event_type} is in force at {format_timestamp(use.period.start)}"
        for assessment in assessments
        for use in assessment.unpriced
    ]
    return (*problems, *found)[:PROBLEMS_MAX]
