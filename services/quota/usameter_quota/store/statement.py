"""Running one statement: its deadline, and what its failures mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usameter_core.grpc.context import remaining_seconds
from usameter_core.postgres.transaction import run_again_where_asked

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Pool

_SECONDS_MAX = 10.0


async def fetch(pool: Pool, sql: str, *arguments: object) -> list[Record]:
    """Run one statement as a transaction of its own; it may run more than once.

    Without BEGIN and COMMIT around it, a reservation is one round trip and not three.

    Raises:
        Unavailable: The connection was lost, the deadline passed or it kept deadlocking; whether
            the statement took effect is then unknown.
    """
    return await run_again_where_asked(
        lambda: pool.fetch(sql, *arguments, timeout=remaining_seconds(at_most=_SECONDS_MAX))
    )
