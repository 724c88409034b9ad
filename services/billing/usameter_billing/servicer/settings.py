"""BillingSettingsService on the wire."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from usameter.billing.v1 import settings_pb2, settings_pb2_grpc
from usameter_billing.domain.settings import TenantSettings
from usameter_billing.service.settings import Settings
from usameter_core.decimals import canonical
from usameter_core.grpc.context import current_principal

if TYPE_CHECKING:
    from typing import Any

    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]


class BillingSettingsServicer(settings_pb2_grpc.BillingSettingsServiceServicer):
    """See settings.proto."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def SetBillingSettings(
        self, request: settings_pb2.SetBillingSettingsRequest, context: Context
    ) -> settings_pb2.BillingSettings:
        """See settings.proto."""
        written = TenantSettings(
            currency=request.currency if request.HasField("currency") else None,
            tax_rate=Decimal(request.tax_rate if request.HasField("tax_rate") else 0),
            due_days=request.due_days if request.HasField("due_days") else None,
            address=request.address,
        )
        await self._settings.set(current_principal().org_id, request.tenant_id, written)
        return _settings_to_proto(request.tenant_id, written)

    async def GetBillingSettings(
        self, request: settings_pb2.GetBillingSettingsRequest, context: Context
    ) -> settings_pb2.BillingSettings:
        """See settings.proto."""
        settings = await self._settings.get(current_principal().org_id, request.tenant_id)
        return _settings_to_proto(request.tenant_id, settings)


def _settings_to_proto(tenant_id: str, settings: TenantSettings) -> settings_pb2.BillingSettings:
    return settings_pb2.BillingSettings(
        tenant_id=tenant_id,
        currency=settings.currency,
        tax_rate=canonical(settings.tax_rate),
        due_days=settings.due_days,
        address=settings.address,
    )
