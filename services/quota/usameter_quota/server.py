"""Assembles the quota service; the only place where it opens anything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from usameter.quota.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    quota_event_pb2,
    quota_event_pb2_grpc,
    quota_pb2,
    quota_pb2_grpc,
    rate_limit_pb2,
    rate_limit_pb2_grpc,
    reconciliation_pb2,
    reconciliation_pb2_grpc,
    reservation_pb2,
    reservation_pb2_grpc,
    webhook_pb2,
    webhook_pb2_grpc,
)
from usameter_core.clock import Clock, SystemClock
from usameter_core.config import Address
from usameter_core.grpc.auth import AccessControl, Authenticator, IdentityAuthenticator
from usameter_core.grpc.channels import open_channel, wait_for_peers
from usameter_core.grpc.server import Servicer, open_server, wait_for_stop
from usameter_core.logging import configure_logging
from usameter_core.metrics import serve_metrics
from usameter_core.postgres.pool import open_pool
from usameter_core.ratelimit.limiter import RateLimiter
from usameter_core.ratelimit.mirror import PolicyMirror
from usameter_core.redis.client import open_redis
from usameter_core.tasks import Doorbell, background_tasks, repeat
from usameter_quota.clients import open_webhook_client
from usameter_quota.config import QuotaSettings
from usameter_quota.service.admission import AdmissionService
from usameter_quota.service.auditing import LimitAuditingService
from usameter_quota.service.holds import HoldService
from usameter_quota.service.limits import QuotaService
from usameter_quota.service.quota_events import QuotaEventService
from usameter_quota.service.rate_limits import RateLimitService
from usameter_quota.service.reconciliation import ReconciliationService
from usameter_quota.service.webhook_delivery import WebhookDelivery
from usameter_quota.service.webhooks import WebhookService
from usameter_quota.servicer.admission import AdmissionServicer
from usameter_quota.servicer.auditing import AuditServicer
from usameter_quota.servicer.holds import ReservationServicer
from usameter_quota.servicer.limits import QuotaServicer
from usameter_quota.servicer.quota_events import QuotaEventServicer
from usameter_quota.servicer.rate_limits import RateLimitServicer
from usameter_quota.servicer.reconciliation import ReconciliationServicer
from usameter_quota.servicer.webhooks import WebhookEndpointServicer
from usameter_quota.store.admission import AdmissionStore
from usameter_quota.store.auditing import AuditStore
from usameter_quota.store.holds import HoldStore
from usameter_quota.store.limits import LimitStore
from usameter_quota.store.quota_events import QuotaEventStore
from usameter_quota.store.rate_limits import RateLimitStore
from usameter_quota.store.reconciliation import ReconciliationStore
from usameter_quota.store.webhooks import WebhookDeliveryStore, WebhookEndpointStore
from usameter_quota.worker import HoldExpirer, PeriodEnder, ReservationPruner


async def serve() -> None:
    """Serve until the process is told to stop."""
    settings = QuotaSettings.from_environment()
    configure_logging(service="quota", log_format=settings.log_format, level=settings.log_level)
    serve_metrics(settings.metrics_port)
    async with AsyncExitStack() as resources:
        identity = await resources.enter_async_context(open_channel(settings.identity_addr))
        authenticator = IdentityAuthenticator(identity, internal_token=settings.internal_token.get_secret_value())
        await wait_for_peers(identity)
        await resources.enter_async_context(open_quota(settings, clock=SystemClock(), authenticator=authenticator))
        await wait_for_stop()


@asynccontextmanager
async def open_quota(settings: QuotaSettings, *, clock: Clock, authenticator: Authenticator) -> AsyncIterator[Address]:
    """The whole service but for who knows the API keys; yields the address it listens on."""
    async with AsyncExitStack() as resources:
        pool = await resources.enter_async_context(
            open_pool(settings.database_url.get_secret_value(), application_name="usameter_quota")
        )
        redis, breaker = await resources.enter_async_context(open_redis(settings.redis_url.get_secret_value()))
        admissions, holds, limits = AdmissionStore(pool), HoldStore(pool), LimitStore(pool)
        events = QuotaEventService(store=QuotaEventStore(pool))
        mirror = PolicyMirror(redis, breaker)
        rate_limits = RateLimitService(clock=clock, store=RateLimitStore(pool), mirror=mirror)
        client = await resources.enter_async_context(open_webhook_client(allow_private=settings.webhook_allow_private))
        tasks = await resources.enter_async_context(background_tasks())
        pruner = ReservationPruner(clock=clock, store=admissions)
        tasks.create_task(repeat(pruner.prune, every_seconds=60, name="prune_reservations"))
        expirer = HoldExpirer(clock=clock, store=holds)
        tasks.create_task(repeat(expirer.expire, every_seconds=0.5, name="expire_holds"))
        ender = PeriodEnder(clock=clock, store=limits)
        tasks.create_task(repeat(ender.end_periods, every_seconds=10, name="end_periods"))
        tasks.create_task(repeat(rate_limits.refresh_mirror, every_seconds=5, name="refresh_rate_limits"))
        bell = Doorbell()
        delivery = WebhookDelivery(clock=clock, store=WebhookDeliveryStore(pool), client=client, tasks=tasks, bell=bell)
        tasks.create_task(repeat(delivery.deliver_due, every_seconds=1, name="deliver_webhooks", bell=bell))
        tasks.create_task(repeat(delivery.prune, every_seconds=60, name="prune_webhook_deliveries"))
        servicers = servicers_of(
            quotas=QuotaService(clock=clock, store=limits),
            events=events,
            admissions=AdmissionService(clock=clock, store=admissions),
            holds=HoldService(clock=clock, store=holds),
            rate_limits=rate_limits,
            webhooks=WebhookService(clock=clock, store=WebhookEndpointStore(pool), client=client),
            reconciliation=ReconciliationService(clock=clock, store=ReconciliationStore(pool)),
            auditing=LimitAuditingService(clock=clock, store=AuditStore(pool)),
        )
        control = AccessControl(
            authenticator=authenticator,
            limiter=RateLimiter(redis, breaker, clock=clock),
            internal_token=settings.internal_token.get_secret_value(),
        )
        address = await resources.enter_async_context(
            open_server(
                settings.listen,
                servicers=servicers,
                control=control,
                validating_methods=AdmissionServicer.VALIDATING_METHODS,
                drain_seconds=settings.drain_seconds,
            )
        )
        # Before the server drains: watches do not end by themselves.
        resources.callback(events.stop_watching)
        yield address


def servicers_of(
    *,
    quotas: QuotaService,
    events: QuotaEventService,
    admissions: AdmissionService,
    holds: HoldService,
    rate_limits: RateLimitService,
    webhooks: WebhookService,
    reconciliation: ReconciliationService,
    auditing: LimitAuditingService,
) -> list[Servicer]:
    """Every gRPC service of quota."""
    return [
        Servicer(
            quota_pb2.DESCRIPTOR.services_by_name["QuotaService"],
            quota_pb2_grpc.add_QuotaServiceServicer_to_server,
            QuotaServicer(quotas),
        ),
        Servicer(
            quota_event_pb2.DESCRIPTOR.services_by_name["QuotaEventService"],
            quota_event_pb2_grpc.add_QuotaEventServiceServicer_to_server,
            QuotaEventServicer(events),
        ),
        Servicer(
            admission_pb2.DESCRIPTOR.services_by_name["AdmissionService"],
            admission_pb2_grpc.add_AdmissionServiceServicer_to_server,
            AdmissionServicer(admissions),
        ),
        Servicer(
            reservation_pb2.DESCRIPTOR.services_by_name["ReservationService"],
            reservation_pb2_grpc.add_ReservationServiceServicer_to_server,
            ReservationServicer(holds),
        ),
        Servicer(
            rate_limit_pb2.DESCRIPTOR.services_by_name["RateLimitService"],
            rate_limit_pb2_grpc.add_RateLimitServiceServicer_to_server,
            RateLimitServicer(rate_limits),
        ),
        Servicer(
            webhook_pb2.DESCRIPTOR.services_by_name["WebhookEndpointService"],
            webhook_pb2_grpc.add_WebhookEndpointServiceServicer_to_server,
            WebhookEndpointServicer(webhooks),
        ),
        Servicer(
            reconciliation_pb2.DESCRIPTOR.services_by_name["ReconciliationService"],
            reconciliation_pb2_grpc.add_ReconciliationServiceServicer_to_server,
            ReconciliationServicer(reconciliation),
        ),
        Servicer(
            audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
            audit_pb2_grpc.add_AuditServiceServicer_to_server,
            AuditServicer(auditing),
        ),
    ]
