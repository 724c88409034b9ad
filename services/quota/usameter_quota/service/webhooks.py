"""Webhook endpoints of organizations, and the log of what was sent to them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from usameter_core.clock import Clock
from usameter_core.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.logging import get_logger
from usameter_quota.clients import NotSent, WebhookClient
from usameter_quota.domain.quota_events import QuotaEventType
from usameter_quota.domain.webhooks import (
    ENDPOINT_ID_PREFIX,
    SECRET_BYTES,
    Delivery,
    WebhookEndpoint,
    WebhookEndpointId,
)
from usameter_quota.store.webhooks import WebhookEndpointStore

log = get_logger()

# Every event of an organization is sent to each of them.
ENDPOINTS_MAX = 50
# Time to bring a new secret to every receiver.
PREVIOUS_SECRET_KEPT = timedelta(days=1)


class WebhookService:
    """Where an organization is told of its quota events. Every method raises NotFound for an id it does not have."""

    def __init__(self, *, clock: Clock, store: WebhookEndpointStore, client: WebhookClient) -> None:
        self._clock = clock
        self._store = store
        self._client = client

    async def create_endpoint(
        self, org_id: OrgId, *, url: str, types: Sequence[QuotaEventType], description: str
    ) -> tuple[WebhookEndpoint, bytes]:
        """Make an endpoint that is sent the events of these types (empty: all) from now on; it and its secret.

        Raises:
            InvalidArgument: Nothing would ever be sent to the URL.
            FailedPrecondition: The organization has as many as it may have.
        """
        try:
            await self._client.check(url)
        except NotSent as error:
            raise InvalidArgument([FieldViolation("url", str(error))]) from None
        endpoint = WebhookEndpoint(
            endpoint_id=WebhookEndpointId(new_uuid()),
            url=url,
            types=tuple(types),
            description=description,
            created_at=self._clock.now(),
            disabled_at=None,
        )
        secret = secrets.token_bytes(SECRET_BYTES)
        if not await self._store.insert_endpoint(org_id, endpoint, secret=secret, endpoints_max=ENDPOINTS_MAX):
            sentence = f"An organization has at most {ENDPOINTS_MAX} webhook endpoints; delete one first"
            raise FailedPrecondition("WEBHOOK_ENDPOINTS_EXHAUSTED", sentence)
        log.info("webhook_endpoint_created", endpoint_id=endpoint.endpoint_id.hex)
        return endpoint, secret

    async def get_endpoint(self, org_id: OrgId, endpoint_id: WebhookEndpointId) -> WebhookEndpoint:
        """The organization's endpoint of that id."""
        endpoint = await self._store.find_endpoint(org_id, endpoint_id)
        if endpoint is None:
            raise _not_found(endpoint_id)
        return endpoint

    async def list_endpoints(self, org_id: OrgId, *, after: UUID | None, limit: int) -> list[WebhookEndpoint]:
        """Up to `limit` endpoints with ids above `after`, the oldest first."""
        return await self._store.list_endpoints(org_id, after=after, limit=limit)

    async def delete_endpoint(self, org_id: OrgId, endpoint_id: WebhookEndpointId) -> None:
        """Forget an endpoint, its secret and its deliveries."""
        if not await self._store.delete_endpoint(org_id, endpoint_id):
            raise _not_found(endpoint_id)
        log.info("webhook_endpoint_deleted", endpoint_id=endpoint_id.hex)

    async def rotate_secret(self, org_id: OrgId, endpoint_id: WebhookEndpointId) -> tuple[WebhookEndpoint, bytes]:
        """Give the endpoint a new secret; the one before signs for another day, an earlier one no more."""
        secret = secrets.token_bytes(SECRET_BYTES)
        previous_until = self._clock.now() + PREVIOUS_SECRET_KEPT
        endpoint = await self._store.replace_secret(org_id, endpoint_id, secret, previous_until=previous_until)
        if endpoint is None:
            raise _not_found(endpoint_id)
        log.info("webhook_secret_rotated", endpoint_id=endpoint_id.hex)
        return endpoint, secret

    async def list_deliveries(
        self, org_id: OrgId, endpoint_id: WebhookEndpointId, *, before: int | None, limit: int
    ) -> list[Delivery]:
        """Up to `limit` deliveries below the position `before` (None: the newest), newest first."""
        await self.get_endpoint(org_id, endpoint_id)
        return await self._store.list_deliveries(org_id, endpoint_id, before=before, limit=limit)


def _not_found(endpoint_id: WebhookEndpointId) -> NotFound:
    return NotFound("webhook_endpoint", format_id(ENDPOINT_ID_PREFIX, endpoint_id))
