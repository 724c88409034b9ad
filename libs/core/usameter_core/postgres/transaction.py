"""Transactions that are run again where PostgreSQL asks for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from usameter_core.errors import Unavailable
from usameter_core.postgres.pool import unavailable_without_postgres

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

Result = TypeVar("Result")

_ATTEMPTS_MAX = 5
# 40P01 and 40001: the transaction did nothing, and doing it again is what the server asks for.
_RETRIED = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)


async def run_transaction(pool: Pool, work: Callable[[Connection], Awaitable[Result]]) -> Result:
    """Run `work` in one READ COMMITTED transaction and commit it; `work` may run more than once.

    Raises:
        Unavailable: The connection was lost, or the transaction kept deadlocking. Whether the
            commit took effect is then unknown.
    """

    async def attempt() -> Result:
        async with pool.acquire() as connection, connection.transaction():
            return await work(connection)

    return await run_again_where_asked(attempt)


async def run_statement(pool: Pool, statement: str, *arguments: object) -> Any:
    """Run one statement, which is its own transaction, in one round trip; returns the first value.

    Raises:
        Unavailable: As `run_transaction`.
    """
    return await run_again_where_asked(lambda: pool.fetchval(statement, *arguments))


async def run_again_where_asked(attempt: Callable[[], Awaitable[Result]]) -> Result:
    """Make one attempt at a transaction of whatever form, and more of them where PostgreSQL asks for it.

    Raises:
        Unavailable: As `run_transaction`.
    """
    with unavailable_without_postgres():
        for number in range(_ATTEMPTS_MAX):
            try:
                return await attempt()
            except _RETRIED:
                await asyncio.sleep(random.uniform(0, 0.01 * 2**number))  # noqa: S311 - jitter, not a secret
    raise Unavailable("The database is too busy; try again")
