"""Bulk generation: every tenant of an organization, in parts that any worker bills (`service/job_parts`)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.clients import OrganizationClient
from usameter_billing.domain.job import BATCH_TENANTS, Job, JobState, retry_after
from usameter_billing.domain.tiling import Tiling
from usameter_billing.service.invoices import check_period
from usameter_billing.service.ledger import LedgerPull
from usameter_billing.store import job_parts, ledger
from usameter_billing.store import jobs as store
from usameter_core.clock import Clock
from usameter_core.errors import FieldViolation, InvalidArgument, NotFound, Unavailable, UsameterError
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.logging import get_logger
from usameter_core.period import Period, format_timestamp
from usameter_core.postgres.transaction import run_transaction
from usameter_core.tasks import Doorbell

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

log = get_logger()


class BulkJobs:
    """Starts and shows bulk runs, and cuts them into parts.

    Args:
        started: Rung when a run is to be cut.
        cut: Rung when parts of one are to be billed.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        clock: Clock,
        ledger: LedgerPull,
        organizations: OrganizationClient,
        started: Doorbell,
        cut: Doorbell,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._ledger = ledger
        self._organizations = organizations
        self._started = started
        self._cut = cut

    async def start(self, org_id: OrgId, *, bounds: Period, finalize: bool) -> Job:
        """Record a run over all tenants with use that was not billed, or subscribed; workers take it from here.

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
        """The job as of the last batches of its parts.

        Raises:
            NotFound: The organization has no such job.
        """
        job = await run_transaction(self._pool, lambda connection: store.load_job(connection, org_id, job_id))
        if job is None:
            raise NotFound("job", format_id("job", job_id))
        return job

    async def cut_waiting(self) -> None:
        """Cut the runs that are waiting for it, one after another, and end those that were left at their end.

        One that cannot be cut is tried again later, and has failed where `retry_after` says so.
        """
        while job := await run_transaction(self._pool, store.claim_job):
            try:
                await self._cut_job(job)
            except Exception as error:
                # The top of the job: one that cannot be cut must not stop the loop that cuts the others.
                await self._postpone(job, error)
        # Their last worker died between its last commit and ending them.
        for org_id, job_id in await run_transaction(self._pool, store.find_finished_jobs):
            try:
                await end_job(self._pool, org_id, job_id)
            except Unavailable:
                # Who holds it ends it, or is ended within a minute; the others are not to wait for that.
                log.warning("bulk_generation_not_ended", job_id=format_id("job", job_id))

    async def _cut_job(self, job: Job) -> None:
        # No transaction is open meanwhile. A pull that outlasts the lease may be made by somebody else as well;
        # what has arrived is kept, so that one is shorter, and whoever is first cuts the job.
        await self._ledger.pull(job.org_id)
        seller_name = await self._organizations.read_name(job.org_id)

        async def work(connection: Connection) -> None:
            after_tenant = await store.load_cuttable(connection, job.org_id, job.job_id)
            if after_tenant is None:
                return
            cuts = await ledger.cut_pending_tenants(
                connection, job.org_id, period=job.period, after=after_tenant, size=BATCH_TENANTS
            )
            last_tenants = [last_tenant for last_tenant, _ in cuts]
            await job_parts.insert_parts(
                connection, job.org_id, job.job_id, after_tenant=after_tenant, last_tenants=last_tenants
            )
            tenants = sum(count for _, count in cuts)
            await store.save_cut(connection, job.org_id, job.job_id, seller_name=seller_name, tenants=tenants)

        await run_transaction(self._pool, work)
        self._cut.ring()
        # Where nobody is to be billed there are no parts, and with that nobody else to end it.
        await end_job(self._pool, job.org_id, job.job_id)

    async def _postpone(self, job: Job, error: Exception) -> None:
        log.error("bulk_generation_failed", job_id=format_id("job", job.job_id), exc_info=error)
        await run_transaction(
            self._pool,
            lambda connection: store.record_failure(
                connection, job, problem_of(error), retry_after=retry_after(job.failures)
            ),
        )


async def end_job(pool: Pool, org_id: OrgId, job_id: UUID) -> None:
    """End a run none of whose parts is open; nothing where one is, or the run has ended.

    In a transaction of its own behind the one that closed a part: of the workers that close the last
    two at once, one sees that none is open.
    """
    state = await run_transaction(pool, lambda connection: store.end_job(connection, org_id, job_id))
    if state is not None:
        log.info("bulk_generation_ended", job_id=format_id("job", job_id), state=state)


def problem_of(error: Exception) -> str:
    """What a job's reader is told of a failure: the sentence of one of ours, and nothing of any other."""
    return str(error) if isinstance(error, UsameterError) else "Internal error"
