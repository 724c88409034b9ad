"""Billing the parts of bulk runs, by any number of workers at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from usameter_billing.domain.invoicing import Assessment
from usameter_billing.domain.job import PROBLEMS_MAX, Attempt, GivingUp, Part, PartState, Retry, after_failure
from usameter_billing.service import generation
from usameter_billing.service.jobs import end_job, problem_of
from usameter_billing.store import job_parts as store
from usameter_billing.store import ledger
from usameter_core.clock import Clock
from usameter_core.errors import Internal
from usameter_core.ids import format_id
from usameter_core.logging import get_logger
from usameter_core.period import format_timestamp
from usameter_core.postgres.transaction import run_transaction
from usameter_core.tasks import Doorbell

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

log = get_logger()


class BulkParts:
    """Bills parts of bulk runs, each batch of tenants in one transaction that also advances their part.

    The part's row is locked meanwhile, and that lock is all that a worker has of it: when it dies, the
    batch is rolled back and the part is there for the next, exactly where it was. A batch waits for
    others at the accounts of tenants that they bill as well, and at the organization's numbers, which
    are locked by its last statement; so batches of one run go in parallel up to there.

    Args:
        due: From issue to the due date, of tenants whose settings say none.
        marks: Rung when ingest has something to be told.
    """

    def __init__(self, *, pool: Pool, clock: Clock, due: timedelta, marks: Doorbell) -> None:
        self._pool = pool
        self._clock = clock
        self._due = due
        self._marks = marks

    async def bill_waiting(self) -> None:
        """Bill parts, one batch after another, until none is left that nobody else works on.

        A part that fails is tried again later, with fewer tenants, until one is given up that fails alone
        (`after_failure`); the others go on.
        """
        while await self._bill_next():
            pass

    async def _bill_next(self) -> bool:
        # As far as it has come, wherever the transaction breaks off.
        attempt: Attempt | None = None

        async def work(connection: Connection) -> Part | None:
            nonlocal attempt
            attempt = None
            part = await store.claim_part(connection)
            if part is None:
                return None
            attempt = Attempt(part)
            attempt = await _name_tenants(connection, part)
            return await self._bill(connection, attempt)

        try:
            billed = await run_transaction(self._pool, work)
        except Exception as error:
            # The top of the part: one that cannot be billed must not stop the loop that bills the others.
            if attempt is None:
                raise
            await self._record_failure(attempt, error)
            return True
        if billed is None:
            return False
        self._marks.ring()
        if billed.state is PartState.DONE:
            await end_job(self._pool, billed.org_id, billed.job_id)
        return True

    async def _bill(self, connection: Connection, attempt: Attempt) -> Part:
        part, tenant_ids = attempt.part, attempt.tenant_ids
        advanced = replace(part, state=PartState.DONE if attempt.is_last else PartState.OPEN)
        if not tenant_ids:
            await store.save_part(connection, advanced, tenants=0)
            return advanced
        due = await generation.assess(
            connection, part.org_id, tenant_ids=tenant_ids, period_of=lambda tiling: tiling.last_ended(part.period.end)
        )
        problems = (*part.problems, *_problems_of(due.assessments))[:PROBLEMS_MAX]
        advanced = replace(advanced, after_tenant=tenant_ids[-1], problems=problems)
        # Before the invoices, whose numbers are locked last.
        await store.save_part(connection, advanced, tenants=len(tenant_ids))
        if part.finalize:
            now = self._clock.now()
            await generation.finalize(
                connection, due, due.invoices, issued_at=now, default_due=self._due, seller_name=part.seller_name
            )
        else:
            await generation.save_drafts(connection, due)
        return advanced

    async def _record_failure(self, attempt: Attempt, error: Exception) -> None:
        part, tenants = attempt.part, len(attempt.tenant_ids)
        of_part = {"job_id": format_id("job", part.job_id), "part": part.number}
        log.error("bulk_generation_failed", **of_part, tenants=tenants, exc_info=error)
        # `Internal` is raised here of one thing only: what is stored and can no longer be read.
        match after_failure(attempt, is_lasting=isinstance(error, Internal)):
            case Retry() as retry:
                await run_transaction(self._pool, lambda connection: store.record_failure(connection, part, retry))
            case GivingUp() as giving_up:
                problem = f"{giving_up.tenant_id}: {problem_of(error)}"
                is_given_up = await run_transaction(
                    self._pool, lambda connection: store.give_up_tenant(connection, part, giving_up, problem)
                )
                if is_given_up:
                    log.error("tenant_given_up", **of_part, tenant_id=giving_up.tenant_id)
                # It was perhaps the last.
                await end_job(self._pool, part.org_id, part.job_id)


async def _name_tenants(connection: Connection, part: Part) -> Attempt:
    tenant_ids = await ledger.load_pending_tenants(
        connection,
        part.org_id,
        period=part.period,
        after=part.after_tenant,
        through=part.through_tenant,
        limit=part.batch_tenants,
    )
    # A part has more than a batch after a failure, and where tenants came in between after it was cut.
    is_last = len(tenant_ids) < part.batch_tenants or tenant_ids[-1] == part.through_tenant
    return Attempt(part, tuple(tenant_ids), is_last=is_last)


def _problems_of(assessments: Iterable[Assessment]) -> list[str]:
    return [
        f"{assessment.tenant_id}: no price of {use.event_type} is in force at {format_timestamp(use.period.start)}"
        for assessment in assessments
        for use in assessment.unpriced
    ]
