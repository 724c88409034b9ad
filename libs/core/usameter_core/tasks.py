"""Background work with an owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from usameter_core.errors import Unavailable
from usameter_core.logging import get_logger

log = get_logger()


class _Stopped(Exception):
    """Raised into the task group to cancel what it runs; nobody outside sees it."""


@asynccontextmanager
async def background_tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group for what runs as long as the service does; on the way out it is cancelled.

    A task that raises ends the service: background work that is dead must not go unnoticed. What
    ends it, a task or what the group is entered for, is raised as itself and in no group.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
            raise _Stopped
    except BaseExceptionGroup as group:
        _, failures = group.split(_Stopped)
        if failures is not None:
            raise failures.exceptions[0] from None


class Doorbell:
    """Wakes a loop that looks for work before it would look by itself; a ring while it works is remembered."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """There may be work."""
        self._event.set()

    async def wait(self, timeout_seconds: float) -> None:
        """Return at a ring, or after the timeout: work of another process rings no bell here."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._event.wait()
        except TimeoutError:
            pass
        self._event.clear()


async def repeat(
    work: Callable[[], Awaitable[object]], *, every_seconds: float, name: str, bell: Doorbell | None = None
) -> None:
    """Do `work` again and again, for ever; what it raises is logged, and it is tried again.

    Args:
        work: Does all there is to do; it must bear being done again after a failure.
        every_seconds: The pause after each round.
        name: For the log.
        bell: A ring ends the pause.
    """
    bell = bell or Doorbell()
    task = asyncio.current_task()
    # A library may lose the cancellation that ends us (asyncio.wait_for before Python 3.12 does).
    while task is None or not task.cancelling():
        # The top of a loop: whatever went wrong, the next round may do better.
        try:
            await work()
        except Unavailable as error:
            log.warning("background_work_failed", work=name, error=str(error))
        except Exception as error:
            log.error("background_work_failed", work=name, exc_info=error)
        await bell.wait(every_seconds)
