"""Delivering quota events to webhook endpoints, at least once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby

from usameter_core.clock import Clock
from usameter_core.errors import Unavailable
from usameter_core.logging import get_logger
from usameter_core.tasks import Doorbell
from usameter_quota.clients import NotSent, WebhookClient
from usameter_quota.domain.webhooks import (
    Attempt,
    DueDelivery,
    WebhookEndpointId,
    message_body,
    message_id,
    pause_after,
    signed_headers,
)
from usameter_quota.metrics import WEBHOOK_ATTEMPTS
from usameter_quota.store.webhooks import WebhookDeliveryStore

log = get_logger()

# An attempt is over after 10 s. What is longer stands for a worker that is gone, or for two clocks that differ.
LEASE = timedelta(seconds=60)
KEPT_AFTER_CLOSING = timedelta(days=30)
# In this process at once. An endpoint that never answers occupies its own attempts only.
_ENDPOINTS_MAX = 32
_ATTEMPTS_OF_ENDPOINT_MAX = 4
_EVENTS_ADDED_MAX = 1_000
_BATCH_DELETED_MAX = 1_000


class WebhookDelivery:
    """Sends what is due, any number of replicas at once.

    A worker leases a message, sends it and records the attempt. Whatever ends the worker in between, the lease runs out
    and the message is sent again; it has the same id then, by which its receiver knows it.

    Args:
        tasks: Runs what is being sent.
        bell: Rung when an endpoint is ready for more.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        store: WebhookDeliveryStore,
        client: WebhookClient,
        tasks: asyncio.TaskGroup,
        bell: Doorbell,
    ) -> None:
        self._clock = clock
        self._store = store
        self._client = client
        self._tasks = tasks
        self._bell = bell
        self._busy: set[WebhookEndpointId] = set()
        # Of the connections to the database; however many answers come at once, the others are left to calls.
        self._recording = asyncio.Semaphore(2)

    async def deliver_due(self) -> None:
        """Begin to send all that is due to endpoints that are not being sent to; returns before it has arrived."""
        while await self._store.add_deliveries(
            now=self._clock.now(), endpoints_max=_ENDPOINTS_MAX, events_max=_EVENTS_ADDED_MAX
        ):
            pass
        free = _ENDPOINTS_MAX - len(self._busy)
        if not free:
            return  # whoever is done rings
        now = self._clock.now()
        due = await self._store.claim_deliveries(
            now=now,
            leased_until=now + LEASE,
            busy=list(self._busy),
            endpoints_max=free,
            deliveries_max=_ATTEMPTS_OF_ENDPOINT_MAX,
        )
        for endpoint_id, deliveries in groupby(due, key=lambda each: each.endpoint_id):
            self._busy.add(endpoint_id)
            self._tasks.create_task(self._deliver_to_endpoint(endpoint_id, list(deliveries)))

    async def _deliver_to_endpoint(self, endpoint_id: WebhookEndpointId, deliveries: Sequence[DueDelivery]) -> None:
        try:
            await asyncio.gather(*(self._deliver(each) for each in deliveries))
        finally:
            self._busy.remove(endpoint_id)
            self._bell.ring()

    async def _deliver(self, due: DueDelivery) -> None:
        attempt = await self._attempt(due)
        # The top of a delivery: where the attempt cannot be recorded, the lease runs out and it is made again.
        try:
            async with self._recording:
                await self._record(due, attempt)
        except Unavailable as error:
            log.warning("webhook_attempt_not_recorded", endpoint_id=due.endpoint_id.hex, error=str(error))
        except Exception as error:
            log.error("webhook_attempt_not_recorded", endpoint_id=due.endpoint_id.hex, exc_info=error)

    async def _attempt(self, due: DueDelivery) -> Attempt:
        now = self._clock.now()
        began = time.monotonic()
        status_code, error = None, None
        try:
            body = message_body(due.event)
            headers = signed_headers(
                body,
                message_id=message_id(due.endpoint_id, due.event.position),
                secrets=due.secrets,
                sent_at=now,
            )
            status_code = await self._client.post(due.url, body=body, headers=headers)
        except NotSent as reason:
            error = str(reason)
        except Exception as fault:
            # Ours; recorded like any failure, or the message would come up again with every lease, for ever.
            log.error("webhook_attempt_failed", endpoint_id=due.endpoint_id.hex, exc_info=fault)
            error = "internal error"
        return Attempt(now, round((time.monotonic() - began) * 1_000), status_code, error)

    async def _record(self, due: DueDelivery, attempt: Attempt) -> None:
        now = self._clock.now()
        if attempt.is_gone:
            await self._store.disable_endpoint(due.org_id, due.endpoint_id, now=now)
            log.warning("webhook_endpoint_disabled", org_id=str(due.org_id), endpoint_id=due.endpoint_id.hex)
        pause = None
        if not attempt.is_success and not attempt.is_gone:
            pause = pause_after(due.attempt_count + 1, jitter=random.random())  # noqa: S311 - jitter, not a secret
        next_attempt_at = None if pause is None else now + pause
        await self._store.record_attempt(due, attempt, now=now, next_attempt_at=next_attempt_at)
        outcome = "delivered" if attempt.is_success else "failed" if next_attempt_at is not None else "given_up"
        WEBHOOK_ATTEMPTS.labels(outcome).inc()
        if outcome == "given_up":
            log.warning(
                "webhook_delivery_given_up",
                org_id=str(due.org_id),
                endpoint_id=due.endpoint_id.hex,
                position=due.event.position,
                status_code=attempt.status_code,
            )

    async def prune(self) -> None:
        """Forget deliveries that were closed 30 days ago."""
        closed_before = self._clock.now() - KEPT_AFTER_CLOSING
        while (
            await self._store.delete_closed_deliveries(closed_before=closed_before, limit=_BATCH_DELETED_MAX)
            == _BATCH_DELETED_MAX
        ):
            pass
