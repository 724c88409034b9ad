"""Comparing counters with what is stored: the quota side of reconciliation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from decimal import Decimal

from usameter_core.clock import Clock
from usameter_core.ids import OrgId, ReservationId
from usameter_core.logging import get_logger
from usameter_quota.domain.reconciliation import (
    CounterKey,
    Difference,
    HeldItem,
    Stored,
    StuckReservation,
    find_differences,
)
from usameter_quota.store.reconciliation import LockedCounters, ReconciliationStore

log = get_logger()


class ReconciliationService:
    """Lets the service that stores entries hold counters against them (invariant I4)."""

    def __init__(self, *, clock: Clock, store: ReconciliationStore) -> None:
        self._clock = clock
        self._store = store

    async def list_counters(self, org_id: OrgId, *, after: CounterKey, limit: int) -> list[tuple[CounterKey, Decimal]]:
        """Up to `limit` counters of the unit of `after` above it, by key."""
        return await self._store.list_counters(org_id, after=after, limit=limit)

    async def list_stuck(self, org_id: OrgId, *, min_age: timedelta, limit: int) -> list[StuckReservation]:
        """Reservations of an organization that have been open for at least `min_age`, oldest first."""
        return await self._store.list_stuck(org_id, created_until=self._clock.now() - min_age, limit=limit)

    @asynccontextmanager
    async def comparing(self, org_id: OrgId, keys: Sequence[CounterKey]) -> AsyncIterator[Comparison]:
        """Hold the heads of these counters; what the comparison repairs is committed at the end."""
        async with self._store.locked(org_id, keys) as counters:
            yield Comparison(counters, held=await counters.list_held(), org_id=org_id, clock=self._clock)


class Comparison:
    """Counters that stand still, and what is open on them."""

    def __init__(self, counters: LockedCounters, *, held: Sequence[HeldItem], org_id: OrgId, clock: Clock) -> None:
        self._counters = counters
        self._held = held
        self._org_id = org_id
        self._clock = clock

    @property
    def open_reservations(self) -> set[ReservationId]:
        """Those that hold something of the counters' heads."""
        return {each.reservation_id for each in self._held}

    async def find_differences(self, stored: Stored, *, repaired_by: str | None) -> list[Difference]:
        """The counters that are wrong, given a snapshot of what is stored that was taken under the lock.

        Args:
            repaired_by: Who has them repaired, in this transaction; None: nobody.
        """
        adjusted = await self._counters.find_adjusted([each.adjustment_id for each in stored.given_back])
        differences = find_differences(await self._counters.read(), self._held, stored, adjusted=adjusted)
        if differences and repaired_by is not None:
            await self._counters.repair(differences, now=self._clock.now(), repaired_by=repaired_by)
            log.warning("counters_repaired", org_id=str(self._org_id), count=len(differences), repaired_by=repaired_by)
        return differences
