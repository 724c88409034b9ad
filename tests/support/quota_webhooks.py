"""The webhooks of one organization on a real PostgreSQL, with a worker that is run by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import uuid4

from tests.support.clock import ManualClock
from tests.support.receiver import Receiver
from usameter_core.ids import OrgId
from usameter_core.postgres.pool import Pool
from usameter_core.tasks import Doorbell, background_tasks
from usameter_quota.clients import WebhookClient
from usameter_quota.domain.quota_events import QuotaEventType
from usameter_quota.domain.webhooks import Delivery, WebhookEndpoint, secret_text
from usameter_quota.service.webhook_delivery import WebhookDelivery
from usameter_quota.service.webhooks import WebhookService
from usameter_quota.store.webhooks import WebhookDeliveryStore, WebhookEndpointStore

NOW = datetime(2026, 1, 15, 10, 30, tzinfo=UTC)


@dataclass(slots=True)
class WebhookBench:
    """The webhooks of one organization."""

    pool: Pool
    client: WebhookClient
    clock: ManualClock = field(default_factory=lambda: ManualClock(NOW))
    org_id: OrgId = field(default_factory=lambda: OrgId(uuid4()))

    @property
    def service(self) -> WebhookService:
        return WebhookService(clock=self.clock, store=WebhookEndpointStore(self.pool), client=self.client)

    async def endpoint(self, receiver: Receiver, *types: QuotaEventType) -> tuple[WebhookEndpoint, str]:
        made, secret = await self.service.create_endpoint(self.org_id, url=receiver.url, types=types, description="")
        return made, secret_text(secret)

    async def happen(self, count: int = 1, type: str = "LIMIT_REACHED") -> None:
        """Write that many quota events, as quota does."""
        await self.pool.execute(
            """
            SELECT quota.append_events($1, array_agg(ROW(
                $1, 0, $2, 't', 'e', $3::timestamptz, 10, 'HARD', 'MONTHLY', 80,
                $3::timestamptz, $3::timestamptz, 10, NULL
            )::quota.quota_event))
            FROM generate_series(1, $4)
            """,
            self.org_id,
            type,
            self.clock.now(),
            count,
        )

    async def deliveries(self, endpoint: WebhookEndpoint) -> list[Delivery]:
        return await self.service.list_deliveries(self.org_id, endpoint.endpoint_id, before=None, limit=1_000)

    async def delivery(self, endpoint: WebhookEndpoint) -> Delivery:
        (delivery,) = await self.deliveries(endpoint)
        return delivery

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[WebhookDelivery]:
        async with background_tasks() as tasks:
            yield self.worker_in(tasks)

    def worker_in(self, tasks: asyncio.TaskGroup) -> WebhookDelivery:
        return WebhookDelivery(
            clock=self.clock,
            store=WebhookDeliveryStore(self.pool),
            client=self.client,
            tasks=tasks,
            bell=Doorbell(),
        )

    async def deliver(self) -> int:
        """Do what a worker does until nothing is due; how many attempts that made."""
        before = await self._attempt_count()
        while await self._is_anything_due():
            # This ends when all that was begun has: what one endpoint is sent may take longer than another's.
            async with asyncio.TaskGroup() as tasks:
                await self.worker_in(tasks).deliver_due()
        return await self._attempt_count() - before

    async def _attempt_count(self) -> int:
        count: int = await self.pool.fetchval("SELECT count(*) FROM quota.webhook_attempt")
        return count

    async def _is_anything_due(self) -> bool:
        due: bool = await self.pool.fetchval(
            """
            SELECT EXISTS (SELECT FROM quota.webhook_delivery WHERE attempt_after <= $1) OR EXISTS (
                SELECT FROM quota.webhook_endpoint AS w JOIN quota.quota_event AS e USING (org_id)
                WHERE e.position > w.position AND w.disabled_at IS NULL
            )
            """,
            self.clock.now(),
        )
        return due
