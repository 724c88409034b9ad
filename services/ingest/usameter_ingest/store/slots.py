"""Slots: each writer adds to its own slice of the rollups."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from usameter_core.logging import get_logger
from usameter_core.postgres.pool import unavailable_without_postgres

log = get_logger()

# Readers sum over slots, so there are few. Writers beyond that many share one: they wait for each
# other's row locks, and are as exact as before.
_SLOTS = 16
_LOCK_CLASS = 0x736C6F74  # "slot"


@asynccontextmanager
async def lease_slot(dsn: str) -> AsyncIterator[int]:
    """A slot that no other writer has, for as long as this connection lives."""
    with unavailable_without_postgres():
        connection = await asyncpg.connect(dsn, timeout=10)
    try:
        for slot in range(_SLOTS):
            if await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", _LOCK_CLASS, slot):
                break
        else:
            slot = 0
            log.warning("slots_exhausted", slots=_SLOTS)
        yield slot
    finally:
        await connection.close(timeout=5)
