"""What services share of PostgreSQL: the pool."""

from __future__ import annotations

import pytest

from tests.conftest import Database
from usameter_core.errors import Unavailable
from usameter_core.postgres import pool as pools
from usameter_core.postgres.pool import open_pool
from usameter_core.postgres.transaction import run_statement


async def test_who_finds_no_free_connection_is_refused_in_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "_ACQUIRE_SECONDS_MAX", 0.05)
    async with open_pool(database.role_url("ingest"), application_name="test", connections_max=1) as pool:
        async with pool.acquire():
            with pytest.raises(Unavailable):
                await run_statement(pool, "SELECT 1")
        assert await run_statement(pool, "SELECT 1") == 1
