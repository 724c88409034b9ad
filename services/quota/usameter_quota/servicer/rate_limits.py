"""The public `RateLimitService`."""

from __future__ import annotations

from typing import Any

from usameter.quota.v1 import rate_limit_pb2, rate_limit_pb2_grpc
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.ids import parse_id
from usameter_core.pages import DEFAULT_LIMIT, decode_page_token, encode_page_token
from usameter_core.ratelimit.policy import RatePolicy
from usameter_quota.domain.rate_limits import SetRatePolicy
from usameter_quota.service.rate_limits import RateLimitService


class RateLimitServicer(rate_limit_pb2_grpc.RateLimitServiceServicer):
    """Rate limits of the calling organization."""

    def __init__(self, service: RateLimitService) -> None:
        self._service = service

    async def SetRateLimit(self, request: rate_limit_pb2.SetRateLimitRequest, context: Any) -> rate_limit_pb2.RateLimit:
        """Sets or replaces a policy."""
        policy = policy_from_proto(request)
        api_key_id = api_key_id_from_proto(request)
        return rate_limit_to_proto(await self._service.set_rate_limit(current_principal().org_id, api_key_id, policy))

    async def ListRateLimits(
        self, request: rate_limit_pb2.ListRateLimitsRequest, context: Any
    ) -> rate_limit_pb2.ListRateLimitsResponse:
        """A page of policies."""
        limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
        after = decode_page_token(request.page_token, tuple[str])
        # One more than asked for tells whether there is a next page.
        policies = await self._service.list_rate_limits(
            current_principal().org_id, after=None if after is None else after[0], limit=limit + 1
        )
        response = rate_limit_pb2.ListRateLimitsResponse(
            rate_limits=[rate_limit_to_proto(policy) for policy in policies[:limit]]
        )
        if len(policies) > limit:
            response.next_page_token = encode_page_token([policies[limit - 1].api_key_id])
        return response

    async def DeleteRateLimit(
        self, request: rate_limit_pb2.DeleteRateLimitRequest, context: Any
    ) -> rate_limit_pb2.DeleteRateLimitResponse:
        """Removes a policy."""
        await self._service.delete_rate_limit(current_principal().org_id, api_key_id_from_proto(request))
        return rate_limit_pb2.DeleteRateLimitResponse()


def api_key_id_from_proto(
    request: rate_limit_pb2.SetRateLimitRequest | rate_limit_pb2.DeleteRateLimitRequest,
) -> str:
    """The key that a request names; empty for the organization's default.

    Raises:
        InvalidArgument: It has no id's form.
    """
    if request.HasField("api_key_id"):
        parse_id("key", request.api_key_id, field="api_key_id")
    return request.api_key_id


def policy_from_proto(request: rate_limit_pb2.SetRateLimitRequest) -> RatePolicy:
    """The policy in a request that satisfies the rules of its proto.

    Raises:
        InvalidArgument: It would be a default that limits nothing.
    """
    policy = RatePolicy(
        requests_per_second=request.requests_per_second if request.HasField("requests_per_second") else None,
        requests_per_minute=request.requests_per_minute if request.HasField("requests_per_minute") else None,
        requests_per_hour=request.requests_per_hour if request.HasField("requests_per_hour") else None,
    )
    if not policy.limits and not request.HasField("api_key_id"):
        sentence = "is required, or requests_per_minute or requests_per_hour; DELETE removes the default"
        raise InvalidArgument([FieldViolation("requests_per_second", sentence)])
    return policy


def rate_limit_to_proto(stored: SetRatePolicy) -> rate_limit_pb2.RateLimit:
    """A policy as its callers see it."""
    return rate_limit_pb2.RateLimit(
        api_key_id=stored.api_key_id or None,
        requests_per_second=stored.policy.requests_per_second,
        requests_per_minute=stored.policy.requests_per_minute,
        requests_per_hour=stored.policy.requests_per_hour,
        updated_at=timestamp_from_datetime(stored.updated_at),
    )
