"""Puts the ingest service together; the only place where something is opened."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import time

import structlog

from usameter.ingest.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    proof_pb2,
    proof_pb2_grpc,
    reconciliation_pb2,
    reconciliation_pb2_grpc,
    snapshot_pb2,
    snapshot_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from usameter_core.clock import Clock, SystemClock
from usameter_core.config import Address
from usameter_core.grpc.auth import AccessControl, IdentityAuthenticator
from usameter_core.grpc.channels import open_channel, wait_for_peers
from usameter_core.grpc.server import Servicer, open_server, wait_for_stop
from usameter_core.logging import configure_logging
from usameter_core.metrics import serve_metrics
from usameter_core.postgres.pool import open_pool
from usameter_core.ratelimit.limiter import RateLimiter
from usameter_core.redis.client import open_redis
from usameter_core.tasks import background_tasks, repeat
from usameter_core.workers import run_workers, stop_with_parent
from usameter_ingest.clients import CounterClient, QuotaClient, TenantRegistry
from usameter_ingest.config import IngestSettings
from usameter_ingest.counters.known import KnownEventCache
from usameter_ingest.counters.live import LiveCounters
from usameter_ingest.service.auditing import AuditingService
from usameter_ingest.service.correcting import CorrectingService
from usameter_ingest.service.grouping import GroupCommitter
from usameter_ingest.service.known import KnownEvents
from usameter_ingest.service.leaf_order import LeafOrder
from usameter_ingest.service.proving import ProvingService
from usameter_ingest.service.reading import ReadingService
from usameter_ingest.service.reconciling import ReconcilingService
from usameter_ingest.service.recording import GroupRecorder
from usameter_ingest.service.sealing import SealingService
from usameter_ingest.service.settling import Settler
from usameter_ingest.service.trail import TrailService
from usameter_ingest.servicer.audit import AuditServicer
from usameter_ingest.servicer.event import EventServicer
from usameter_ingest.servicer.ledger import LedgerServicer
from usameter_ingest.servicer.proof import ProofServicer
from usameter_ingest.servicer.reconciliation import ReconciliationServicer
from usameter_ingest.servicer.snapshot import SnapshotServicer
from usameter_ingest.servicer.usage import UsageServicer
from usameter_ingest.store.auditing import AuditStore
from usameter_ingest.store.entries import EntryStore
from usameter_ingest.store.epochs import EpochStore
from usameter_ingest.store.ledger import LedgerStore
from usameter_ingest.store.outcomes import OutcomeStore
from usameter_ingest.store.reconciliation import ReconciliationStore
from usameter_ingest.store.slots import lease_slot
from usameter_ingest.store.usage import UsageStore
from usameter_ingest.worker import DailySeal, Janitor, QuotaOutbox


async def serve() -> None:
    """Serve until the process is told to stop: by itself, or by the workers that it keeps running."""
    settings = _settings()
    if settings.ingest_workers > 1:
        await run_workers(
            "usameter_ingest",
            count=settings.ingest_workers,
            listen=settings.listen,
            drain_seconds=settings.drain_seconds,
        )
        return
    serve_metrics(settings.metrics_port)
    async with open_ingest(settings, clock=SystemClock()):
        await wait_for_stop()


async def work(arguments: argparse.Namespace) -> None:
    """Serve as worker `arguments.number` of several, until told to stop or until the parent is gone."""
    stop_with_parent()
    settings = _settings()
    structlog.contextvars.bind_contextvars(worker=arguments.number)
    serve_metrics(settings.metrics_port, worker=arguments.number)
    async with open_ingest(settings, clock=SystemClock(), shares_port=True):
        await wait_for_stop()


def _settings() -> IngestSettings:
    settings = IngestSettings.from_environment()
    configure_logging(service="ingest", log_format=settings.log_format, level=settings.log_level)
    return settings


@asynccontextmanager
async def open_ingest(settings: IngestSettings, *, clock: Clock, shares_port: bool = False) -> AsyncIterator[Address]:
    """The running service; yields the address it answers on, which others may listen on too if it `shares_port`."""
    token = settings.internal_token.get_secret_value()
    database_url = settings.database_url.get_secret_value()
    async with AsyncExitStack() as opened:
        pool = await opened.enter_async_context(open_pool(database_url, application_name="usameter-ingest"))
        redis, breaker = await opened.enter_async_context(open_redis(settings.redis_url.get_secret_value()))
        slot = await opened.enter_async_context(lease_slot(database_url))
        identity = await opened.enter_async_context(open_channel(settings.identity_addr))
        quota_channel = await opened.enter_async_context(open_channel(settings.quota_addr))

        entries, outcomes, epochs = EntryStore(pool, slot=slot), OutcomeStore(pool), EpochStore(pool)
        quota = QuotaClient(quota_channel, internal_token=token)
        settler = Settler(quota)
        opened.push_async_callback(settler.drain)
        live = LiveCounters(redis, breaker, clock=clock)
        opened.push_async_callback(live.flush)
        cache = KnownEventCache(redis, breaker)
        tasks = await opened.enter_async_context(background_tasks())
        recorder = GroupRecorder(
            entries=entries,
            known=KnownEvents(entries=entries, cache=cache),
            outcomes=outcomes,
            quota=quota,
            tenants=TenantRegistry(identity, internal_token=token),
            settler=settler,
            live=live,
        )
        sealing = SealingService(epochs)
        janitor = Janitor(quota=quota, outcomes=outcomes)
        outbox = QuotaOutbox(quota=quota, outcomes=outcomes)
        _start_loops(tasks, settler=settler, janitor=janitor, outbox=outbox, sealing=sealing)
        if settings.ingest_seal_at is not None:
            daily = DailySeal(sealing, at=time.fromisoformat(settings.ingest_seal_at), clock=clock)
            tasks.create_task(repeat(daily.run_once, every_seconds=30, name="daily_seal"))
        tasks.create_task(repeat(live.flush, every_seconds=0.5, name="flush_live_counters"))
        tasks.create_task(repeat(cache.flush, every_seconds=0.1, name="flush_known_events"))

        reading = ReadingService(entries=entries, usage=UsageStore(pool), clock=clock)
        correcting = CorrectingService(entries=entries, outcomes=outcomes, quota=quota, settler=settler)
        ledger = LedgerStore(pool)
        trail = TrailService(ledger=ledger, order=LeafOrder(ledger))
        proving = ProvingService(ledger)
        reconciling = ReconcilingService(
            store=ReconciliationStore(pool),
            outcomes=outcomes,
            counters=CounterClient(quota_channel, internal_token=token),
            quota=quota,
        )
        control = AccessControl(
            authenticator=IdentityAuthenticator(identity, internal_token=token),
            limiter=RateLimiter(redis, breaker, clock=clock),
            internal_token=token,
            cron_secret=settings.cron_secret.get_secret_value(),
        )
        events = EventServicer(
            committer=GroupCommitter(recorder, tasks=tasks),
            reading=reading,
            correcting=correcting,
            control=control,
            clock=clock,
        )
        await wait_for_peers(identity, quota_channel)
        yield await opened.enter_async_context(
            open_server(
                settings.listen,
                servicers=[
                    Servicer(
                        event_pb2.DESCRIPTOR.services_by_name["EventService"],
                        event_pb2_grpc.add_EventServiceServicer_to_server,
                        events,
                    ),
                    Servicer(
                        usage_pb2.DESCRIPTOR.services_by_name["UsageService"],
                        usage_pb2_grpc.add_UsageServiceServicer_to_server,
                        UsageServicer(reading, live=live),
                    ),
                    Servicer(
                        snapshot_pb2.DESCRIPTOR.services_by_name["SnapshotService"],
                        snapshot_pb2_grpc.add_SnapshotServiceServicer_to_server,
                        SnapshotServicer(sealing=sealing, epochs=epochs, clock=clock),
                    ),
                    Servicer(
                        ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"],
                        ledger_pb2_grpc.add_LedgerServiceServicer_to_server,
                        LedgerServicer(trail=trail, proving=proving, ledger=ledger),
                    ),
                    Servicer(
                        proof_pb2.DESCRIPTOR.services_by_name["ProofService"],
                        proof_pb2_grpc.add_ProofServiceServicer_to_server,
                        ProofServicer(proving=proving, ledger=ledger),
                    ),
                    Servicer(
                        reconciliation_pb2.DESCRIPTOR.services_by_name["ReconciliationService"],
                        reconciliation_pb2_grpc.add_ReconciliationServiceServicer_to_server,
                        ReconciliationServicer(reconciling),
                    ),
                    Servicer(
                        audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
                        audit_pb2_grpc.add_AuditServiceServicer_to_server,
                        AuditServicer(auditing=AuditingService(AuditStore(pool)), reconciling=reconciling),
                    ),
                ],
                control=control,
                validating_methods=EventServicer.VALIDATING_METHODS,
                drain_seconds=settings.drain_seconds,
                shares_port=shares_port,
            )
        )


def _start_loops(
    tasks: asyncio.TaskGroup, *, settler: Settler, janitor: Janitor, outbox: QuotaOutbox, sealing: SealingService
) -> None:
    tasks.create_task(settler.run())
    tasks.create_task(repeat(janitor.run_once, every_seconds=10, name="janitor"))
    tasks.create_task(repeat(janitor.prune, every_seconds=600, name="prune_outcomes"))
    tasks.create_task(repeat(outbox.run_once, every_seconds=0.2, name="quota_outbox"))
    # What a sealer left behind when it was killed.
    tasks.create_task(repeat(sealing.seal_closed, every_seconds=5, name="seal_closed"))
