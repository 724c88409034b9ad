"""Billing the parts of bulk runs, by any number of workers at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from usameter_billing.domain.invoicing import Assessment
from usameter_billing.domain.job import PROBLEMS_MAX, Part, PartState, retry_after
from usameter_billing.service import generation
from usameter_billing.service.jobs import BATCH_TENANTS, end_job, problem_of
from usameter_billing.store import job_parts as store
from usameter_billing.store import ledger
from usameter_core.clock import Clock
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

        A part that fails is tried again later, and has failed where `retry_after` says so; the others go on.
        """
        while await self._bill_next():
            pass

    async def _bill_next(self) -> bool:
        claimed: Part | None = None

        async def work(connection: Connection) -> Part | None:
            nonlocal claimed
            claimed = None
            claimed = await store.claim_part(connection)
            return None if claimed is None else await self._bill(connection, claimed)

        try:
            billed = await run_transaction(self._pool, work)
        except Exception as error:
            # The top of the part: one that cannot be billed must not stop the loop that bills the others.
            if claimed is None:
                raise
            await self._postpone(claimed, error)
            # It may have been given up, and was perhaps the last.
            await end_job(self._pool, claimed.org_id, claimed.job_id)
            return True
        if billed is None:
            return False
        self._marks.ring()
        if billed.state is PartState.DONE:
            await end_job(self._pool, billed.org_id, billed.job_id)
        return True

    async def _bill(self, connection: Connection, part: Part) -> Part:
        tenant_ids = await ledger.load_pending_tenants(
            connection,
            part.org_id,
            period=part.period,
            after=part.after_tenant,
            through=part.through_tenant,
            limit=BATCH_TENANTS,
        )
        # A part has more than a batch where tenants came in between after it was cut.
        is_done = len(tenant_ids) < BATCH_TENANTS or tenant_ids[-1] == part.through_tenant
        advanced = replace(part, state=PartState.DONE if is_done else PartState.OPEN)
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

    async def _postpone(self, part: Part, error: Exception) -> None:
        log.error("bulk_generation_failed", job_id=format_id("job", part.job_id), part=part.number, exc_info=error)
        problem = f"{part}: {problem_of(error)}"
        await run_transaction(
            self._pool,
            lambda connection: store.record_failure(connection, part, problem, retry_after=retry_after(part.failures)),
        )


def _problems_of(assessments: Iterable[Assessment]) -> list[str]:
    return [
        f"{assessment.tenant_id}: no price of {use.event_type} is in force at {format_timestamp(use.period.start)}"
        for assessment in assessments
        for use in assessment.unpriced
    ]
