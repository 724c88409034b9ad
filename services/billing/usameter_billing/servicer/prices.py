"""PriceService on the wire."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from usameter.billing.v1 import price_pb2, price_pb2_grpc
from usameter_billing.service.prices import Prices
from usameter_billing.servicer.messages import (
    component_to_proto,
    terms_from_proto,
    version_to_proto,
)
from usameter_core.decimals import canonical
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import datetime_from_timestamp
from usameter_core.money import format_amount
from usameter_core.pages import DEFAULT_LIMIT

if TYPE_CHECKING:
    from typing import Any

    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]


class PriceServicer(price_pb2_grpc.PriceServiceServicer):
    """See price.proto."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices

    async def CreatePrice(self, request: price_pb2.CreatePriceRequest, context: Context) -> price_pb2.PriceVersion:
        """See price.proto."""
        version, notices = await self._prices.create(
            current_principal().org_id,
            event_type=request.event_type,
            tenant_id=request.tenant_id if request.HasField("tenant_id") else None,
            effective_from=datetime_from_timestamp(request.effective_from, field="effective_from"),
            terms=terms_from_proto(request.price),
        )
        return version_to_proto(version, notices)

    async def ListPrices(self, request: price_pb2.ListPricesRequest, context: Context) -> price_pb2.ListPricesResponse:
        """See price.proto."""
        page = await self._prices.list(
            current_principal().org_id,
            event_type=request.event_type,
            tenant_id=request.tenant_id,
            limit=request.limit if request.HasField("limit") else DEFAULT_LIMIT,
            page_token=request.page_token,
        )
        return price_pb2.ListPricesResponse(
            prices=[version_to_proto(version) for version in page.versions], next_page_token=page.next_page_token
        )

    async def PreviewPrice(
        self, request: price_pb2.PreviewPriceRequest, context: Context
    ) -> price_pb2.PreviewPriceResponse:
        """See price.proto."""
        currency, rating = self._prices.preview(terms_from_proto(request.price), Decimal(request.quantity))
        return price_pb2.PreviewPriceResponse(
            amount=format_amount(rating.exact_amount, currency),
            exact_amount=canonical(rating.exact_amount),
            breakdown=[component_to_proto(component) for component in rating.components],
        )
