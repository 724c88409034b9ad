"""Delivering the outbox: ingest learns which invoices cover which snapshots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from usameter_billing.clients import IngestClient
from usameter_billing.domain.invoice import Mark
from usameter_billing.store import outbox
from usameter_core.errors import Unavailable
from usameter_core.ids import OrgId
from usameter_core.logging import get_logger
from usameter_core.postgres.transaction import run_transaction

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Pool

log = get_logger()

_CLAIM_INVOICES = 500
# A delivery takes seconds at most; one that failed is tried again after this.
_RETRY_AFTER = timedelta(seconds=15)


class MarkDelivery:
    """Tells ingest of finalized invoices, at least once, in order of version per snapshot."""

    def __init__(self, *, pool: Pool, ingest: IngestClient) -> None:
        self._pool = pool
        self._ingest = ingest

    async def deliver_due(self) -> None:
        """Deliver what is due, a bounded number of marks at a time.

        Where the marks of an organization cannot be delivered, those of the others still are.
        """
        while marks := await run_transaction(
            self._pool,
            lambda connection: outbox.claim_marks(connection, limit=_CLAIM_INVOICES, retry_after=_RETRY_AFTER),
        ):
            by_organization: dict[OrgId, list[Mark]] = defaultdict(list)
            for mark in marks:
                by_organization[mark.org_id].append(mark)
            for org_id, of_organization in by_organization.items():
                await self._deliver(org_id, of_organization)

    async def _deliver(self, org_id: OrgId, marks: Sequence[Mark]) -> None:
        # What fails stays in the outbox, and comes up again once its claim has run out.
        try:
            await self._ingest.mark_snapshots(org_id, marks)
            await run_transaction(self._pool, lambda connection: outbox.delete_marks(connection, org_id, marks))
        except Unavailable as error:
            log.warning("marks_not_delivered", org_id=str(org_id), invoices=len(marks), reason=str(error))
        except Exception as error:
            # The top of an organization's delivery: a fault of one must not keep the others waiting.
            log.error("marks_not_delivered", org_id=str(org_id), invoices=len(marks), exc_info=error)
        else:
            log.info("marks_delivered", org_id=str(org_id), invoices=len(marks))
