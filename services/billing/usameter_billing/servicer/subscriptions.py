"""SubscriptionService on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usameter.billing.v1 import subscription_pb2, subscription_pb2_grpc
from usameter_billing.domain.subscription import Subscription
from usameter_billing.service.subscriptions import Moment, Subscriptions
from usameter_billing.servicer.messages import subscription_to_proto
from usameter_core.clock import Clock
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import datetime_in
from usameter_core.ids import parse_id
from usameter_core.pages import DEFAULT_LIMIT

if TYPE_CHECKING:
    from typing import Any

    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]


class SubscriptionServicer(subscription_pb2_grpc.SubscriptionServiceServicer):
    """See subscription.proto."""

    def __init__(self, subscriptions: Subscriptions, *, clock: Clock) -> None:
        self._subscriptions = subscriptions
        self._clock = clock

    async def CreateSubscription(
        self, request: subscription_pb2.CreateSubscriptionRequest, context: Context
    ) -> subscription_pb2.Subscription:
        """See subscription.proto."""
        subscription = await self._subscriptions.create(
            current_principal().org_id,
            tenant_id=request.tenant_id,
            plan_id=parse_id("pln", request.plan_id, field="plan_id"),
            start_at=datetime_in(request, "start_at"),
        )
        return self._to_proto(subscription)

    async def GetSubscription(
        self, request: subscription_pb2.GetSubscriptionRequest, context: Context
    ) -> subscription_pb2.Subscription:
        """See subscription.proto."""
        subscription_id = parse_id("sub", request.subscription_id, field="subscription_id")
        return self._to_proto(await self._subscriptions.get(current_principal().org_id, subscription_id))

    async def ListSubscriptions(
        self, request: subscription_pb2.ListSubscriptionsRequest, context: Context
    ) -> subscription_pb2.ListSubscriptionsResponse:
        """See subscription.proto."""
        page = await self._subscriptions.list(
            current_principal().org_id,
            tenant_id=request.tenant_id,
            limit=request.limit if request.HasField("limit") else DEFAULT_LIMIT,
            page_token=request.page_token,
        )
        return subscription_pb2.ListSubscriptionsResponse(
            subscriptions=[self._to_proto(each) for each in page.subscriptions], next_page_token=page.next_page_token
        )

    async def CancelSubscription(
        self, request: subscription_pb2.CancelSubscriptionRequest, context: Context
    ) -> subscription_pb2.Subscription:
        """See subscription.proto."""
        subscription = await self._subscriptions.cancel(
            current_principal().org_id,
            parse_id("sub", request.subscription_id, field="subscription_id"),
            Moment(request.at_once, datetime_in(request, "at")),
        )
        return self._to_proto(subscription)

    async def ChangePlan(
        self, request: subscription_pb2.ChangePlanRequest, context: Context
    ) -> subscription_pb2.Subscription:
        """See subscription.proto."""
        subscription = await self._subscriptions.change_plan(
            current_principal().org_id,
            parse_id("sub", request.subscription_id, field="subscription_id"),
            plan_id=parse_id("pln", request.plan_id, field="plan_id"),
            moment=Moment(request.at_once, datetime_in(request, "at")),
        )
        return self._to_proto(subscription)

    def _to_proto(self, subscription: Subscription) -> subscription_pb2.Subscription:
        return subscription_to_proto(subscription, now=self._clock.now())
