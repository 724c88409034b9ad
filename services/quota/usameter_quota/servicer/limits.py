"""The public `QuotaService`."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from usameter.quota.v1 import quota_pb2, quota_pb2_grpc
from usameter_core.decimals import canonical
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.pages import DEFAULT_LIMIT, decode_page_token, encode_page_token
from usameter_quota.domain.limits import (
    SOFT_LIMIT_PERCENT_DEFAULT,
    EnforcementMode,
    LimitPeriod,
    LimitTerms,
    Quota,
    QuotaDefault,
)
from usameter_quota.service.limits import QuotaService


class QuotaServicer(quota_pb2_grpc.QuotaServiceServicer):
    """Limits of the calling organization."""

    def __init__(self, service: QuotaService) -> None:
        self._service = service

    async def SetQuota(self, request: quota_pb2.SetQuotaRequest, context: Any) -> quota_pb2.Quota:
        """Sets or replaces a limit."""
        quota = await self._service.set_quota(
            current_principal(), request.tenant_id, request.event_type, terms_from_proto(request)
        )
        return quota_to_proto(quota)

    async def GetQuota(self, request: quota_pb2.GetQuotaRequest, context: Any) -> quota_pb2.Quota:
        """A limit and its use."""
        quota = await self._service.get_quota(current_principal().org_id, request.tenant_id, request.event_type)
        return quota_to_proto(quota)

    async def DeleteQuota(self, request: quota_pb2.DeleteQuotaRequest, context: Any) -> quota_pb2.DeleteQuotaResponse:
        """Removes a limit."""
        await self._service.delete_quota(current_principal(), request.tenant_id, request.event_type)
        return quota_pb2.DeleteQuotaResponse()

    async def ListQuotas(self, request: quota_pb2.ListQuotasRequest, context: Any) -> quota_pb2.ListQuotasResponse:
        """A page of limits with their use."""
        limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
        after = decode_page_token(request.page_token, tuple[str, str])
        # One more than asked for tells whether there is a next page.
        quotas = await self._service.list_quotas(
            current_principal().org_id,
            tenant_id=request.tenant_id or None,
            after=after or ("", ""),
            limit=limit + 1,
        )
        response = quota_pb2.ListQuotasResponse(quotas=[quota_to_proto(quota) for quota in quotas[:limit]])
        if len(quotas) > limit:
            last = quotas[limit - 1]
            response.next_page_token = encode_page_token((last.tenant_id, last.event_type))
        return response

    async def SetQuotaDefault(self, request: quota_pb2.SetQuotaDefaultRequest, context: Any) -> quota_pb2.QuotaDefault:
        """Sets or replaces a default."""
        default = await self._service.set_default(current_principal(), request.event_type, terms_from_proto(request))
        return default_to_proto(default)

    async def GetQuotaDefault(self, request: quota_pb2.GetQuotaDefaultRequest, context: Any) -> quota_pb2.QuotaDefault:
        """A default."""
        return default_to_proto(await self._service.get_default(current_principal().org_id, request.event_type))

    async def DeleteQuotaDefault(
        self, request: quota_pb2.DeleteQuotaDefaultRequest, context: Any
    ) -> quota_pb2.DeleteQuotaDefaultResponse:
        """Removes a default."""
        await self._service.delete_default(current_principal(), request.event_type)
        return quota_pb2.DeleteQuotaDefaultResponse()

    async def ListQuotaDefaults(
        self, request: quota_pb2.ListQuotaDefaultsRequest, context: Any
    ) -> quota_pb2.ListQuotaDefaultsResponse:
        """A page of defaults."""
        limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
        after = decode_page_token(request.page_token, tuple[str])
        defaults = await self._service.list_defaults(
            current_principal().org_id, after=after[0] if after else "", limit=limit + 1
        )
        response = quota_pb2.ListQuotaDefaultsResponse(
            quota_defaults=[default_to_proto(default) for default in defaults[:limit]]
        )
        if len(defaults) > limit:
            response.next_page_token = encode_page_token((defaults[limit - 1].event_type,))
        return response

    async def CheckQuota(self, request: quota_pb2.CheckQuotaRequest, context: Any) -> quota_pb2.CheckQuotaResponse:
        """Whether a quantity would be admitted now."""
        quantity = Decimal(request.quantity) if request.HasField("quantity") else Decimal(1)
        if not quantity:
            raise InvalidArgument([FieldViolation("quantity", "must be greater than 0")])
        check = await self._service.check_quota(
            current_principal().org_id, request.tenant_id, request.event_type, quantity
        )
        response = quota_pb2.CheckQuotaResponse(allowed=check.allowed)
        if check.quota is not None:
            response.quota.CopyFrom(quota_to_proto(check.quota))
        return response


def terms_from_proto(request: quota_pb2.SetQuotaRequest | quota_pb2.SetQuotaDefaultRequest) -> LimitTerms:
    """The terms of a request that satisfies the rules of its proto.

    Raises:
        InvalidArgument: A grace period for a limit that is not SOFT.
    """
    mode = EnforcementMode(quota_pb2.EnforcementMode.Name(request.enforcement_mode))
    graced = request.HasField("grace_period_hours")
    if graced and mode is not EnforcementMode.SOFT:
        raise InvalidArgument([FieldViolation("grace_period_hours", f"is for SOFT limits only, not {mode.value}")])
    return LimitTerms(
        limit_value=Decimal(request.limit_value),
        enforcement_mode=mode,
        period=LimitPeriod(quota_pb2.QuotaPeriod.Name(request.period)),
        soft_limit_percent=(
            request.soft_limit_percent if request.HasField("soft_limit_percent") else SOFT_LIMIT_PERCENT_DEFAULT
        ),
        grace_period_hours=request.grace_period_hours if graced else None,
    )


def quota_to_proto(quota: Quota) -> quota_pb2.Quota:
    """A quota as its callers see it."""
    return quota_pb2.Quota(
        tenant_id=quota.tenant_id,
        event_type=quota.event_type,
        limit_value=canonical(quota.terms.limit_value),
        enforcement_mode=quota_pb2.EnforcementMode.Value(quota.terms.enforcement_mode.value),
        period=quota_pb2.QuotaPeriod.Value(quota.terms.period.value),
        soft_limit_percent=quota.terms.soft_limit_percent,
        grace_period_hours=quota.terms.grace_period_hours,
        from_default=quota.from_default,
        current=canonical(quota.current),
        reserved=canonical(quota.reserved),
        remaining=canonical(quota.remaining),
        reset_at=timestamp_from_datetime(quota.reset_at),
        grace_ends_at=None if quota.grace_ends_at is None else timestamp_from_datetime(quota.grace_ends_at),
        updated_at=timestamp_from_datetime(quota.updated_at),
    )


def default_to_proto(default: QuotaDefault) -> quota_pb2.QuotaDefault:
    """A default as its callers see it."""
    return quota_pb2.QuotaDefault(
        event_type=default.event_type,
        limit_value=canonical(default.terms.limit_value),
        enforcement_mode=quota_pb2.EnforcementMode.Value(default.terms.enforcement_mode.value),
        period=quota_pb2.QuotaPeriod.Value(default.terms.period.value),
        soft_limit_percent=default.terms.soft_limit_percent,
        grace_period_hours=default.terms.grace_period_hours,
        updated_at=timestamp_from_datetime(default.updated_at),
    )
