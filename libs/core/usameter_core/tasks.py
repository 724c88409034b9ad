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
    """Wakes loops that look for work before they would look by themselves.

    A ring is for every loop that listens, also for one that works just then: each says up to which ring it has heard.
    """

    def __init__(self) -> None:
        self._rings = 0
        self._rung = asyncio.Event()

    @property
    def rings(self) -> int:
        """How often it has rung so far."""
        return self._rings

    def ring(self) -> None:
        """There may be work."""
        self._rings += 1
        self._rung.set()
        # A new one for the next ring: cleared, this one would be so for loops that have not looked at it yet.
        self._rung = asyncio.Event()

    async def wait(self, timeout_seconds: float, *, after: int) -> None:
        """Return at a ring behind the first `after`, or after the timeout: another process rings no bell here."""
        if self._rings > after:
            return
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._rung.wait()
        except TimeoutError:
            pass


async def repeat(
    work: Callable[[], Awaitable[object]], *, every_seconds: float, name: str, bell: Doorbell | None = None
) -> None:
    """Do `work` again and again, for ever; what it raises is logged, and it is tried again.

    Args:
        work: Does all there is to do; it must bear being done again after a failure.
        every_seconds: The pause after each round.
        name: For the log.
        bell: A ring ends the pause; one during the work has the work done again at once.
    """
    bell = bell or Doorbell()
    task = asyncio.current_task()
    # A library may lose the cancellation that ends us (asyncio.wait_for before Python 3.12 does).
    while task is None or not task.cancelling():
        heard = bell.rings
        # The top of a loop: whatever went wrong, the next round may do better.
        try:
            await work()
        except Unavailable as error:
            log.warning("background_work_failed", work=name, error=str(error))
        except Exception as error:
            log.error("background_work_failed", work=name, exc_info=error)
        await bell.wait(every_seconds, after=heard)
