"""How fast invoices are generated: 10,000 tenants, five event types with three tiers each, a snapshot a day of each.

Service, stand-in for ingest and client share one process; PostgreSQL is durable. Ingest is told of the
invoices meanwhile, by the same process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path

import grpc.aio
import psutil
import structlog

from tests.bench.harness import Row, at_least
from tests.conftest import Database
from tests.support.billing import Organization, open_world
from usameter.billing.v1 import invoice_pb2, price_pb2
from usameter.common.v1 import job_pb2
from usameter_core.postgres.migrate import migrate
from usameter_devstack.ports import free_port
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_devstack.valkey import EmbeddedValkey

_TENANTS = 10_000
_DAYS = 3
_EVENT_TYPES = [f"type_{number}" for number in range(5)]
_TIERS = [
    price_pb2.PriceTier(up_to="1000", unit_amount="0.10"),
    price_pb2.PriceTier(up_to="10000", unit_amount="0.08"),
    price_pb2.PriceTier(unit_amount="0.05"),
]


async def measure_invoices(directory: Path, repetitions: int) -> list[Row]:
    """Invoices a second of a bulk run that finalizes; every run has a database of its own."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    row = Row(
        f"invoices for {_TENANTS:,} tenants × {len(_EVENT_TYPES)} event types",
        "invoices/s",
        at_least(500),
        at_least(2_000),
        note=f"{_DAYS} days; snapshots pulled before; generated and finalized",
    )
    used = {"billing": 0.0, "postgres": 0.0}
    async with (
        EmbeddedPostgres(directory / "billing", free_port()) as server,
        EmbeddedValkey(directory / "billing-valkey", free_port()) as valkey,
    ):
        assert server.pid is not None
        postgres = psutil.Process(server.pid)
        for number in range(repetitions):
            name = f"bench_{number}"
            await server.ensure_database(name)
            await migrate(server.url(name), schema="billing", package="usameter_billing")
            row.add(await _generate(Database(server, name, valkey.url()), postgres, used))
    row.cpu = {name: seconds * 1e6 / _TENANTS / repetitions for name, seconds in used.items()}
    return [row]


async def _generate(database: Database, postgres: psutil.Process, used: dict[str, float]) -> float:
    """One run: invoices a second. Adds to `used` the seconds of CPU that it took."""
    async with open_world(database, page_snapshots=None) as world, world.open_service() as channel:
        org = world.organization(channel)
        for event_type in _EVENT_TYPES:
            price = price_pb2.Price(model=price_pb2.graduated, currency="USD", tiers=_TIERS)
            await org.set_terms(event_type, price)
        org.seal(
            *(
                (f"tenant_{tenant:06}", event_type, f"2026-01-{day:02}", str(1 + tenant * day % 20_000))
                for tenant in range(_TENANTS)
                for event_type in _EVENT_TYPES
                for day in range(1, _DAYS + 1)
            )
        )
        # Nobody has use, so all that this call does is to pull the ledger.
        with suppress(grpc.aio.AioRpcError):
            await org.draft("nobody")
        started, python, server = time.perf_counter(), time.process_time(), _backend_seconds(postgres)
        job = await _run_job(org)
        seconds = time.perf_counter() - started
        assert (job.state, job.done) == (job_pb2.succeeded, _TENANTS)
        used["billing"] += time.process_time() - python
        used["postgres"] += _backend_seconds(postgres) - server
        return _TENANTS / seconds


async def _run_job(org: Organization) -> job_pb2.Job:
    """A run that finalizes, to its end."""
    job = await org.start_bulk(finalize=True)
    while job.state == job_pb2.running:
        await asyncio.sleep(0.05)
        job = await org.invoices.GetJob(invoice_pb2.GetJobRequest(job_id=job.id), metadata=org.metadata)
    return job


def _backend_seconds(postgres: psutil.Process) -> float:
    """What the server's processes have used so far; those that ended do not count."""
    return sum(sum(child.cpu_times()[:2]) for child in postgres.children())
