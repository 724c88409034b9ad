"""Pulling the ledger: copies of the sealed snapshots, complete up to a stated epoch."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import TYPE_CHECKING

from usameter_billing.clients import IngestClient, SnapshotPage
from usameter_billing.domain.tiling import Tiling
from usameter_billing.store import ledger, subscriptions
from usameter_core.ids import OrgId
from usameter_core.logging import get_logger
from usameter_core.postgres.transaction import run_transaction

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

log = get_logger()


class LedgerPull:
    """Brings what ingest has sealed since the last time.

    The cursor is locked while a page is written, and not while ingest is called. Two processes that
    pull the same pages do the same work twice and nothing wrong: a snapshot is kept once, and the
    cursor only moves forward, over epochs that have arrived as a whole. Within a process one pull
    serves all who wait for it.
    """

    def __init__(self, *, pool: Pool, ingest: IngestClient) -> None:
        self._pool = pool
        self._ingest = ingest
        self._running: dict[OrgId, asyncio.Task[None]] = {}
        self._queued: dict[OrgId, asyncio.Task[None]] = {}

    async def pull(self, org_id: OrgId) -> None:
        """Return when all that was sealed before this call is here.

        Raises:
            Unavailable: Ingest or the database cannot be reached; what has arrived is kept.
        """
        queued = self._queued.get(org_id)
        if queued is None:
            # A pull under way may have asked before the caller's epoch was sealed, so it does not
            # serve this caller; the next one serves all who come until it starts. It belongs to
            # nobody's call, so it has a context, and with that a deadline, of its own.
            queued = asyncio.create_task(self._pull_next(org_id), context=Context())
            self._queued[org_id] = queued
        await asyncio.shield(queued)

    async def _pull_next(self, org_id: OrgId) -> None:
        running = self._running.get(org_id)
        if running is not None:
            await asyncio.wait([running])
        self._running[org_id] = self._queued.pop(org_id)
        try:
            await self._pull(org_id)
        finally:
            del self._running[org_id]

    async def _pull(self, org_id: OrgId) -> None:
        after_epoch = await run_transaction(
            self._pool, lambda connection: ledger.load_through_epoch(connection, org_id)
        )
        through_epoch: int | None = None
        count = 0
        async for page in self._ingest.snapshot_pages(org_id, after_epoch=after_epoch):
            # An epoch that is sealed while we page may be on the later pages, but only the first
            # page's word covers all of them.
            through_epoch = page.through_epoch if through_epoch is None else through_epoch
            count += len(page.snapshots)
            if page.snapshots or through_epoch > after_epoch:
                await self._keep(org_id, page, through_epoch)
        if count:
            log.info("snapshots_pulled", org_id=str(org_id), snapshots=count, through_epoch=through_epoch)

    async def _keep(self, org_id: OrgId, page: SnapshotPage, through_epoch: int) -> None:
        async def work(connection: Connection) -> None:
            await ledger.lock_cursor(connection, org_id)
            tenant_ids = sorted({snapshot.tenant_id for snapshot in page.snapshots})
            # After the lock, which whoever changes a subscription holds as well.
            held = await subscriptions.load_subscriptions(connection, org_id, tenant_ids)
            tilings = {tenant_id: Tiling(each) for tenant_id, each in held.items()}
            await ledger.add_snapshots(connection, org_id, page.snapshots, tilings=tilings)
            # The last epoch on a page may go on with the next one.
            complete = through_epoch if page.is_last else page.snapshots[-1].epoch - 1
            await ledger.advance_cursor(connection, org_id, min(complete, through_epoch))

        await run_transaction(self._pool, work)
