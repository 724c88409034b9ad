"""The connection pool, and what a lost connection means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from usameter_core.errors import Unavailable

if TYPE_CHECKING:
    from asyncpg.pool import PoolAcquireContext, PoolConnectionProxy

    _AsyncpgPool = asyncpg.Pool[asyncpg.Record]
else:
    _AsyncpgPool = asyncpg.Pool

# As text: the classes take type arguments in their stubs only.
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

_ACQUIRE_SECONDS_MAX = 10.0
# Of a process that stands still amid a transaction, or a machine that is gone: its locks would stay until TCP notices.
# Between two statements services compute, or wait ten seconds at most for another.
_IDLE_IN_TRANSACTION_MAX = "60s"

# What asyncpg raises when the server is gone, going, starting, or too slow to wait for.
CONNECTION_FAILURES = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.InterfaceError,
    # What asyncpg says of a connection that the server ended while it lay in the pool ("another
    # operation is in progress"): its state machine has not seen the end yet.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.QueryCanceledError,
    # No connection, memory or disk left; and a primary that is one no more.
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
)


@asynccontextmanager
async def open_pool(
    dsn: str, *, application_name: str, connections_max: int = 10, command_timeout_seconds: float = 30
) -> AsyncIterator[Pool]:
    """A pool whose connections are UTC, READ COMMITTED and durable (`synchronous_commit` on).

    A transaction without a statement for a minute is ended by the server.

    Raises:
        Unavailable: The server cannot be reached.
    """
    settings = {
        "application_name": application_name,
        "timezone": "UTC",
        "default_transaction_isolation": "read committed",
        "synchronous_commit": "on",
        "idle_in_transaction_session_timeout": _IDLE_IN_TRANSACTION_MAX,
    }
    with unavailable_without_postgres():
        pool = await _Pool(
            dsn,
            min_size=1,
            max_size=connections_max,
            max_queries=50_000,
            max_inactive_connection_lifetime=300,
            loop=None,
            connection_class=asyncpg.Connection,
            record_class=asyncpg.Record,
            command_timeout=command_timeout_seconds,
            timeout=10,
            server_settings=settings,
            reset=_leave_as_it_is,
        )
    try:
        yield pool
    finally:
        # Calls are drained by now; what still holds a connection is not waited for.
        try:
            async with asyncio.timeout(5):
                await pool.close()
        except TimeoutError:
            pool.terminate()


class _Pool(_AsyncpgPool):
    """Nobody waits for ever until somebody else gives back a connection."""

    def acquire(self, *, timeout: float | None = None) -> PoolAcquireContext[asyncpg.Record]:
        """A connection; each of the pool's own `fetch` and `execute` takes it here.

        Raises:
            TimeoutError: None was to be had for so many seconds; ten unless said otherwise.
        """
        if timeout is None and self.get_idle_size() == 0:
            timeout = _ACQUIRE_SECONDS_MAX
        # Where a connection is idle there is nothing to wait for, and a timeout of its own costs 30 µs.
        return super().acquire(timeout=timeout)


async def _leave_as_it_is(connection: Connection) -> None:
    """Instead of asyncpg's reset, which costs a round trip for each use of a connection.

    Ours have nothing to reset: settings are made with SET LOCAL, locks are taken in transactions.
    """


@contextmanager
def unavailable_without_postgres() -> Iterator[None]:
    """Turns a lost or refused connection into `Unavailable`.

    Whether a statement took effect is unknown to whoever catches it: callers for whom that
    matters look (events and reservation outcomes are their own keys), they do not guess.
    """
    try:
        yield
    except CONNECTION_FAILURES as error:
        raise Unavailable("The database cannot be reached; try again") from error
