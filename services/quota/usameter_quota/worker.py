"""Forgetting settled reservations, giving holds back, and ending periods."""

from __future__ import annotations

from datetime import timedelta

from usameter_core.clock import Clock
from usameter_core.errors import Internal
from usameter_core.ids import OrgId, ReservationId
from usameter_core.logging import get_logger
from usameter_core.metrics import INVARIANT_VIOLATIONS
from usameter_quota.store.admission import AdmissionStore
from usameter_quota.store.holds import DueHold, HoldStore
from usameter_quota.store.limits import HeadKey, LimitStore

log = get_logger()

# A reserve or a settlement that is later than this meets nobody who knows it.
KEPT_AFTER_CLOSING = timedelta(days=1)
# Row locks of a batch are held for some 10 ms.
_BATCH_RESERVATIONS_MAX = 1_000
# A replica whose clock is behind still decides in a period that has ended by ours. It must not find
# forgotten what was reached there, and reach it again.
CLOCK_SKEW_MAX = timedelta(seconds=10)
_BATCH_HEADS_MAX = 500


class ReservationPruner:
    """Deletes reservations a day after they were settled; never an open one."""

    def __init__(self, *, clock: Clock, store: AdmissionStore) -> None:
        self._clock = clock
        self._store = store

    async def prune(self) -> int:
        """Delete all that is due, a batch at a time; how many that were."""
        total = 0
        while True:
            deleted = await self._store.delete_closed_reservations(
                closed_before=self._clock.now() - KEPT_AFTER_CLOSING, limit=_BATCH_RESERVATIONS_MAX
            )
            total += deleted
            if deleted < _BATCH_RESERVATIONS_MAX:
                break
        if total:
            log.info("reservations_pruned", count=total)
        return total


class HoldExpirer:
    """Gives back holds whose time has passed, each once, whichever replica comes first."""

    def __init__(self, *, clock: Clock, store: HoldStore) -> None:
        self._clock = clock
        self._store = store

    async def expire(self) -> int:
        """Give back all that are due and unclaimed; how many that were.

        One that would take its counter below zero (I4) stays, and keeps no other waiting.
        """
        total = 0
        last: DueHold | None = None
        while True:
            due = await self._store.list_due(until=self._clock.now(), after=last, limit=_BATCH_HEADS_MAX)
            by_org: dict[OrgId, list[ReservationId]] = {}
            for hold in due:
                by_org.setdefault(hold.org_id, []).append(hold.hold_id)
            for org_id, hold_ids in by_org.items():
                total += await self._give_back(org_id, hold_ids)
            if len(due) < _BATCH_HEADS_MAX:
                break
            last = due[-1]
        if total:
            log.info("holds_expired", count=total)
        return total

    async def _give_back(self, org_id: OrgId, hold_ids: list[ReservationId]) -> int:
        try:
            return await self._store.expire(org_id, hold_ids, now=self._clock.now())
        except Internal:
            if len(hold_ids) > 1:
                # It rolled back all of them, so each is given back on its own.
                return sum([await self._give_back(org_id, [hold_id]) for hold_id in hold_ids])
            INVARIANT_VIOLATIONS.labels("I4").inc()
            log.error("hold_below_zero", org_id=str(org_id), id=str(hold_ids[0]))
            return 0


class PeriodEnder:
    """Ends periods in which a line of a limit was reached, each once, whichever replica comes first."""

    def __init__(self, *, clock: Clock, store: LimitStore) -> None:
        self._clock = clock
        self._store = store

    async def end_periods(self) -> int:
        """End all that are over, of the rolling window the day; how many that were."""
        until = self._clock.now() - CLOCK_SKEW_MAX
        total = 0
        while True:
            ended = await self._store.list_ended_periods(until=until, limit=_BATCH_HEADS_MAX)
            by_org: dict[OrgId, list[HeadKey]] = {}
            for head in ended:
                by_org.setdefault(head.org_id, []).append(head)
            for org_id, heads in by_org.items():
                await self._store.end_periods(org_id, heads, until=until)
            total += len(ended)
            if len(ended) < _BATCH_HEADS_MAX:
                break
        if total:
            log.info("periods_ended", count=total)
        return total
