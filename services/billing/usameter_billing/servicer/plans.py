"""PlanService on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usameter.billing.v1 import plan_pb2, plan_pb2_grpc
from usameter_billing.domain.plan import PlanInterval, PlanTerms
from usameter_billing.service.plans import Plans
from usameter_billing.servicer.messages import plan_to_proto, terms_from_proto
from usameter_core.grpc.context import current_principal
from usameter_core.pages import DEFAULT_LIMIT

if TYPE_CHECKING:
    from typing import Any

    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]


class PlanServicer(plan_pb2_grpc.PlanServiceServicer):
    """See plan.proto."""

    def __init__(self, plans: Plans) -> None:
        self._plans = plans

    async def CreatePlan(self, request: plan_pb2.CreatePlanRequest, context: Context) -> plan_pb2.Plan:
        """See plan.proto."""
        return plan_to_proto(await self._plans.create(current_principal().org_id, _terms_from_proto(request)))

    async def ListPlans(self, request: plan_pb2.ListPlansRequest, context: Context) -> plan_pb2.ListPlansResponse:
        """See plan.proto."""
        page = await self._plans.list(
            current_principal().org_id,
            limit=request.limit if request.HasField("limit") else DEFAULT_LIMIT,
            page_token=request.page_token,
        )
        return plan_pb2.ListPlansResponse(
            plans=[plan_to_proto(plan) for plan in page.plans], next_page_token=page.next_page_token
        )


def _terms_from_proto(request: plan_pb2.CreatePlanRequest) -> PlanTerms:
    return PlanTerms(
        name=request.name,
        base_fee=request.base_fee,
        currency=request.currency,
        interval=PlanInterval(plan_pb2.PlanInterval.Name(request.interval or plan_pb2.MONTHLY)),
        prices=tuple((each.event_type, terms_from_proto(each.price)) for each in request.prices),
    )
