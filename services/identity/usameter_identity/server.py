"""Assembles the identity service; the only place where it opens anything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from usameter.identity.v1 import (
    api_key_pb2,
    api_key_pb2_grpc,
    authentication_pb2,
    authentication_pb2_grpc,
    organization_pb2,
    organization_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
)
from usameter_core.clock import SystemClock
from usameter_core.config import Address
from usameter_core.grpc.auth import AccessControl
from usameter_core.grpc.server import Servicer, open_server, wait_for_stop
from usameter_core.logging import configure_logging
from usameter_core.metrics import serve_metrics
from usameter_core.postgres.pool import open_pool
from usameter_core.ratelimit.limiter import RateLimiter
from usameter_core.redis.client import open_redis
from usameter_identity.config import IdentitySettings
from usameter_identity.service import IdentityService
from usameter_identity.servicer import (
    ApiKeyServicer,
    AuthenticationServicer,
    OrganizationServicer,
    TenantServicer,
)
from usameter_identity.store import IdentityStore


async def serve() -> None:
    """Serve until the process is told to stop."""
    settings = IdentitySettings.from_environment()
    configure_logging(service="identity", log_format=settings.log_format, level=settings.log_level)
    serve_metrics(settings.metrics_port)
    async with open_identity(settings):
        await wait_for_stop()


@asynccontextmanager
async def open_identity(settings: IdentitySettings) -> AsyncIterator[Address]:
    """The whole service; yields the address it listens on."""
    async with AsyncExitStack() as resources:
        pool = await resources.enter_async_context(
            open_pool(settings.database_url.get_secret_value(), application_name="usameter_identity")
        )
        redis, breaker = await resources.enter_async_context(open_redis(settings.redis_url.get_secret_value()))
        service = IdentityService(store=IdentityStore(pool))
        yield await resources.enter_async_context(
            open_server(
                settings.listen,
                servicers=servicers_of(service),
                control=AccessControl(
                    authenticator=service,
                    limiter=RateLimiter(redis, breaker, clock=SystemClock()),
                    internal_token=settings.internal_token.get_secret_value(),
                ),
                drain_seconds=settings.drain_seconds,
            )
        )


def servicers_of(service: IdentityService) -> list[Servicer]:
    """Every gRPC service of identity."""
    return [
        Servicer(
            authentication_pb2.DESCRIPTOR.services_by_name["AuthenticationService"],
            authentication_pb2_grpc.add_AuthenticationServiceServicer_to_server,
            AuthenticationServicer(service),
        ),
        Servicer(
            api_key_pb2.DESCRIPTOR.services_by_name["ApiKeyService"],
            api_key_pb2_grpc.add_ApiKeyServiceServicer_to_server,
            ApiKeyServicer(service),
        ),
        Servicer(
            tenant_pb2.DESCRIPTOR.services_by_name["TenantService"],
            tenant_pb2_grpc.add_TenantServiceServicer_to_server,
            TenantServicer(service),
        ),
        Servicer(
            organization_pb2.DESCRIPTOR.services_by_name["OrganizationService"],
            organization_pb2_grpc.add_OrganizationServiceServicer_to_server,
            OrganizationServicer(service),
        ),
    ]
