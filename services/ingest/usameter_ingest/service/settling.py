"""Settling: telling quota what became of reservations, after the caller has its answer."""

from __future__ import annotations

import asyncio

from usameter_core.ids import OrgId, ReservationId
from usameter_core.logging import get_logger
from usameter_ingest.clients import QuotaClient
from usameter_ingest.store.outcomes import Outcome

log = get_logger()

_SETTLEMENTS_MAX = 1_000
_WAITING_MAX = 100_000
# Nobody waits for a settlement, and one call for those of several groups costs as much as for one.
_GATHERING_SECONDS = 0.1
_DRAIN_SECONDS = 10


class Settler:
    """A queue of settlements. What is lost with it, the janitor finds and settles (invariant I4)."""

    def __init__(self, quota: QuotaClient) -> None:
        self._quota = quota
        self._waiting: asyncio.Queue[tuple[OrgId, ReservationId, Outcome]] = asyncio.Queue(_WAITING_MAX)

    def settle(self, org_id: OrgId, reservation_id: ReservationId, outcome: Outcome) -> None:
        """Have a reservation closed soon; where too many wait, the janitor does it later."""
        try:
            self._waiting.put_nowait((org_id, reservation_id, outcome))
        except asyncio.QueueFull:
            log.warning("settlement_left_to_janitor", org_id=str(org_id), reservation_id=str(reservation_id))

    async def settle_now(self, org_id: OrgId, reservation_id: ReservationId, outcome: Outcome) -> None:
        """Have a reservation closed when this returns; where quota cannot be reached, the janitor does it later."""
        await self._deliver([(org_id, reservation_id, outcome)])

    async def run(self) -> None:
        """Settle what is queued, many at a time, for ever."""
        while True:
            batch = [await self._waiting.get()]
            await asyncio.sleep(_GATHERING_SECONDS)
            while len(batch) < _SETTLEMENTS_MAX and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            await self._deliver(batch)

    async def drain(self) -> None:
        """Settle what is queued now, as far as that goes in some seconds; once, at the end."""
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._waiting.empty():
                    batch = [self._waiting.get_nowait() for _ in range(min(self._waiting.qsize(), _SETTLEMENTS_MAX))]
                    await self._deliver(batch)
        except TimeoutError:
            log.warning("settlements_left_to_janitor", count=self._waiting.qsize())

    async def _deliver(self, batch: list[tuple[OrgId, ReservationId, Outcome]]) -> None:
        try:
            await self._quota.settle(batch)
        except Exception as error:
            # The top of a loop that must not end. The outcome rows stand, so nothing is lost: the
            # janitor asks quota what is still open.
            log.warning("settlements_left_to_janitor", count=len(batch), error=f"{type(error).__name__}: {error}")
