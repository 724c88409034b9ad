"""The public `WebhookEndpointService`."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from usameter.quota.v1 import webhook_pb2, webhook_pb2_grpc
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.ids import format_id, parse_id
from usameter_core.pages import DEFAULT_LIMIT, decode_page_token, encode_page_token
from usameter_quota.domain.webhooks import (
    ENDPOINT_ID_PREFIX,
    MESSAGE_TYPES,
    Attempt,
    Delivery,
    WebhookEndpoint,
    WebhookEndpointId,
    message_id,
    message_type,
    secret_text,
)
from usameter_quota.service.webhooks import WebhookService


class WebhookEndpointServicer(webhook_pb2_grpc.WebhookEndpointServiceServicer):
    """Webhook endpoints of the calling organization."""

    def __init__(self, service: WebhookService) -> None:
        self._service = service

    async def CreateWebhookEndpoint(
        self, request: webhook_pb2.CreateWebhookEndpointRequest, context: Any
    ) -> webhook_pb2.WebhookEndpoint:
        """Makes an endpoint; answers with its secret."""
        endpoint, secret = await self._service.create_endpoint(
            current_principal().org_id,
            url=request.url,
            types=[MESSAGE_TYPES[each] for each in request.event_types],
            description=request.description,
        )
        return endpoint_to_proto(endpoint, secret=secret)

    async def ListWebhookEndpoints(
        self, request: webhook_pb2.ListWebhookEndpointsRequest, context: Any
    ) -> webhook_pb2.ListWebhookEndpointsResponse:
        """A page of endpoints, the oldest first."""
        limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
        after = decode_page_token(request.page_token, tuple[UUID])
        # One more than asked for tells whether there is a next page.
        endpoints = await self._service.list_endpoints(
            current_principal().org_id, after=after[0] if after else None, limit=limit + 1
        )
        response = webhook_pb2.ListWebhookEndpointsResponse(
            webhook_endpoints=[endpoint_to_proto(endpoint) for endpoint in endpoints[:limit]]
        )
        if len(endpoints) > limit:
            response.next_page_token = encode_page_token([endpoints[limit - 1].endpoint_id.hex])
        return response

    async def GetWebhookEndpoint(
        self, request: webhook_pb2.GetWebhookEndpointRequest, context: Any
    ) -> webhook_pb2.WebhookEndpoint:
        """One endpoint."""
        endpoint = await self._service.get_endpoint(current_principal().org_id, endpoint_id_from_proto(request))
        return endpoint_to_proto(endpoint)

    async def DeleteWebhookEndpoint(
        self, request: webhook_pb2.DeleteWebhookEndpointRequest, context: Any
    ) -> webhook_pb2.DeleteWebhookEndpointResponse:
        """Removes an endpoint."""
        await self._service.delete_endpoint(current_principal().org_id, endpoint_id_from_proto(request))
        return webhook_pb2.DeleteWebhookEndpointResponse()

    async def RotateWebhookSecret(
        self, request: webhook_pb2.RotateWebhookSecretRequest, context: Any
    ) -> webhook_pb2.WebhookEndpoint:
        """Gives an endpoint a new secret; answers with it."""
        endpoint, secret = await self._service.rotate_secret(
            current_principal().org_id, endpoint_id_from_proto(request)
        )
        return endpoint_to_proto(endpoint, secret=secret)

    async def ListWebhookDeliveries(
        self, request: webhook_pb2.ListWebhookDeliveriesRequest, context: Any
    ) -> webhook_pb2.ListWebhookDeliveriesResponse:
        """A page of an endpoint's deliveries, the newest first."""
        limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
        before = decode_page_token(request.page_token, tuple[int])
        endpoint_id = endpoint_id_from_proto(request)
        deliveries = await self._service.list_deliveries(
            current_principal().org_id, endpoint_id, before=before[0] if before else None, limit=limit + 1
        )
        response = webhook_pb2.ListWebhookDeliveriesResponse(
            deliveries=[delivery_to_proto(endpoint_id, delivery) for delivery in deliveries[:limit]]
        )
        if len(deliveries) > limit:
            response.next_page_token = encode_page_token([deliveries[limit - 1].position])
        return response


def endpoint_id_from_proto(
    request: webhook_pb2.GetWebhookEndpointRequest
    | webhook_pb2.DeleteWebhookEndpointRequest
    | webhook_pb2.RotateWebhookSecretRequest
    | webhook_pb2.ListWebhookDeliveriesRequest,
) -> WebhookEndpointId:
    """The endpoint that a request names.

    Raises:
        InvalidArgument: It has no id's form.
    """
    return WebhookEndpointId(parse_id(ENDPOINT_ID_PREFIX, request.webhook_endpoint_id, field="webhook_endpoint_id"))


def endpoint_to_proto(endpoint: WebhookEndpoint, *, secret: bytes | None = None) -> webhook_pb2.WebhookEndpoint:
    """An endpoint as its owner sees it; with its secret, where that is new."""
    return webhook_pb2.WebhookEndpoint(
        id=format_id(ENDPOINT_ID_PREFIX, endpoint.endpoint_id),
        url=endpoint.url,
        event_types=[message_type(each) for each in endpoint.types],
        description=endpoint.description,
        created_at=timestamp_from_datetime(endpoint.created_at),
        disabled_at=None if endpoint.disabled_at is None else timestamp_from_datetime(endpoint.disabled_at),
        secret=None if secret is None else secret_text(secret),
    )


def delivery_to_proto(endpoint_id: WebhookEndpointId, delivery: Delivery) -> webhook_pb2.WebhookDelivery:
    """A delivery as the endpoint's owner sees it."""
    next_attempt_at = delivery.next_attempt_at
    return webhook_pb2.WebhookDelivery(
        id=message_id(endpoint_id, delivery.position),
        type=message_type(delivery.type),
        position=delivery.position,
        state=webhook_pb2.WebhookDeliveryState.Value(delivery.state.value),
        created_at=timestamp_from_datetime(delivery.created_at),
        next_attempt_at=None if next_attempt_at is None else timestamp_from_datetime(next_attempt_at),
        attempts=[attempt_to_proto(attempt) for attempt in delivery.attempts],
    )


def attempt_to_proto(attempt: Attempt) -> webhook_pb2.WebhookAttempt:
    """An attempt as the endpoint's owner sees it."""
    return webhook_pb2.WebhookAttempt(
        attempted_at=timestamp_from_datetime(attempt.attempted_at),
        duration_ms=attempt.duration_ms,
        status_code=attempt.status_code,
        error=attempt.error,
    )
