"""Loops: the janitor of reservations, the outbox to quota, sealing once a day."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, time, timedelta

from usameter_core.clock import Clock
from usameter_core.errors import Unavailable, UsameterError
from usameter_core.ids import OrgId, ReservationId, new_uuid
from usameter_core.logging import get_logger
from usameter_core.period import latest_time_of_day
from usameter_ingest.clients import QuotaClient
from usameter_ingest.service.sealing import SealingService
from usameter_ingest.store.outcomes import GivenBack, OutcomeStore

log = get_logger()

_BATCH_MAX = 1_000
# So many wait for the one among them that takes longest.
_SETTLED_AT_ONCE_MAX = 100
# To decide takes a millisecond, unless a writer is at it.
_DECIDE_SECONDS_MAX = 1.0
# Longer than any call that could still be between reserve and settle.
JANITOR_MIN_AGE_SECONDS = 30
_PRUNED_AFTER = timedelta(hours=1)


class Janitor:
    """Closes the reservations that a crash or a lost settlement left open (invariant I4).

    It cannot know whether the entries of one were committed, so it makes it so: whoever inserts
    the outcome row first decides, and a writer that comes later rolls back.
    """

    def __init__(
        self, *, quota: QuotaClient, outcomes: OutcomeStore, min_age_seconds: int = JANITOR_MIN_AGE_SECONDS
    ) -> None:
        self._quota = quota
        self._outcomes = outcomes
        self._min_age_seconds = min_age_seconds

    async def run_once(self) -> int:
        """Settle what has been open for too long; returns how many that were.

        Raises:
            UsameterError: Some could not be decided or settled, and will be tried again; all others are settled.
        """
        left_open = await self._quota.list_open(min_age_seconds=self._min_age_seconds, limit=_BATCH_MAX)
        settled, failure = 0, None
        for start in range(0, len(left_open), _SETTLED_AT_ONCE_MAX):
            try:
                settled += await self._settle(left_open[start : start + _SETTLED_AT_ONCE_MAX])
            except UsameterError as error:
                # The others are not to wait for what ails these, which may last.
                failure = error
        if settled:
            log.info("reservations_settled_by_janitor", count=settled)
        if failure is not None:
            raise failure
        return settled

    async def _settle(self, left_open: Sequence[tuple[OrgId, ReservationId]]) -> int:
        settlements = []
        for org_id, reservation_id in left_open:
            try:
                async with asyncio.timeout(_DECIDE_SECONDS_MAX):
                    outcome = await self._outcomes.decide(org_id, reservation_id)
            except TimeoutError:
                # A writer has inserted the outcome and neither commits nor rolls back.
                log.warning("reservation_undecided", org_id=str(org_id), reservation_id=str(reservation_id))
            else:
                settlements.append((org_id, reservation_id, outcome))
        if settlements:
            await self._quota.settle(settlements)
        return len(settlements)

    async def prune(self) -> None:
        """Delete outcomes that nobody will ask for again."""
        still_open = await self._quota.list_open(min_age_seconds=0, limit=_BATCH_MAX)
        if len(still_open) < _BATCH_MAX:
            await self._outcomes.prune(older_than=_PRUNED_AFTER, still_open=still_open)


class QuotaOutbox:
    """Delivers what corrections give back."""

    def __init__(self, *, quota: QuotaClient, outcomes: OutcomeStore) -> None:
        self._quota = quota
        self._outcomes = outcomes

    async def run_once(self) -> int:
        """Deliver what waits; returns how many rows that were. What quota refuses stays, and is logged.

        Raises:
            Unavailable: Quota or the database cannot be reached; all that waits stays.
        """
        waiting = await self._outcomes.list_given_back(_BATCH_MAX)
        if not waiting:
            return 0
        try:
            await self._quota.give_back(waiting)
            delivered = waiting
        except Unavailable:
            # No row is to blame, and a thousand calls would fail like this one.
            raise
        except UsameterError:
            delivered = await self._deliver_singly(waiting)
        await self._outcomes.delete_given_back(delivered)
        return len(delivered)

    async def _deliver_singly(self, waiting: Sequence[GivenBack]) -> list[GivenBack]:
        """Deliver row by row, so that one that quota refuses keeps no other waiting; those that were delivered."""
        delivered: list[GivenBack] = []
        refused: list[GivenBack] = []
        for row in waiting:
            try:
                await self._quota.give_back([row])
            except Unavailable:
                break
            except UsameterError:
                refused.append(row)
            else:
                delivered.append(row)
        if refused:
            log.error("given_back_refused", event_ids=[str(row.event_id) for row in refused])
        return delivered


class DailySeal:
    """Closes every ledger once a day, if it has entries from before a time of day.

    Nothing is remembered of what was done: an epoch that holds such entries is open or it is not. So replicas
    close each once between them, and what was missed, for a minute or a week, is caught up at the first look.
    """

    def __init__(self, sealing: SealingService, *, at: time, clock: Clock) -> None:
        self._sealing = sealing
        self._at = at
        self._clock = clock
        self._closed_before: datetime | None = None

    async def run_once(self) -> None:
        """Close what is due; the loop that seals what is closed does the rest.

        Raises:
            Internal, Unavailable: Some could not be closed, and will be at the next look; all the others are.
        """
        due = latest_time_of_day(self._at, self._clock.now())
        if due != self._closed_before:
            await self._sealing.close_all(ingested_before=due, job_id=new_uuid())
            self._closed_before = due
