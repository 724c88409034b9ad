"""Reserving and checking, and how to tell that somebody waits."""

from __future__ import annotations

from decimal import Decimal
from uuid import uuid4

from tests.support.quota import Bench
from usameter_core.ids import ReservationId
from usameter_core.postgres.pool import Connection


async def check(bench: Bench, quantity: str, tenant_id: str = "t") -> bool:
    return (await bench.quotas.check_quota(bench.caller.org_id, tenant_id, "e", Decimal(quantity))).allowed


async def reserved(bench: Bench, quantity: str, tenant_id: str = "t") -> ReservationId:
    """An open reservation."""
    reservation_id = ReservationId(uuid4())
    (verdict,) = await bench.reserve([(tenant_id, "e", quantity)], reservation_id=reservation_id)
    assert verdict.admitted
    return reservation_id


async def is_waited(connection: Connection, *, by: int = 1) -> bool:
    waiting = await connection.fetchval("SELECT count(*) FROM pg_catalog.pg_locks WHERE NOT granted")
    return bool(waiting == by)
