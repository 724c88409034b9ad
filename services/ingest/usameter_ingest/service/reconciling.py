"""Reconciling: quota's counters beside the ledger (invariant I4), and repairing what differs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from usameter_core.errors import Unavailable, UsameterError
from usameter_core.ids import OrgId, ReservationId
from usameter_core.logging import get_logger
from usameter_core.metrics import INVARIANT_VIOLATIONS
from usameter_ingest.clients import AuditedLimits, CounterClient, QuotaClient
from usameter_ingest.domain.reconciliation import CounterKey, CounterUnit, Difference, StuckReservation
from usameter_ingest.store.outcomes import Outcome, OutcomeStore
from usameter_ingest.store.reconciliation import ReconciliationStore, Stored

log = get_logger()

PAGE_COUNTERS_MAX = 5_000
# Where much is wrong a page ends after some of it: its caller waits 30 s.
PAGE_SECONDS_MAX = 10.0
# Heads are locked while so many are compared: some milliseconds.
_COMPARED_AT_ONCE_MAX = 100
# The janitor, which comes every 10 s and takes what is older than 30 s, has had its turn.
_STUCK_SECONDS = 60
_STUCK_MAX = 1_000


@dataclass(frozen=True, slots=True)
class SettledReservation:
    """A stuck reservation: whether its entries are stored, and whether it is settled now."""

    reservation: StuckReservation
    stored: bool
    fixed: bool


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a page of counters came to; `next_after` is None once everything is compared."""

    compared: int
    differences: Sequence[Difference]
    stuck: Sequence[SettledReservation]
    next_after: CounterKey | None


class ReconcilingService:
    """Compares counters with entries and open reservations, a page at a time.

    The two databases cannot be read at one moment, so it looks twice: first without any lock, and what
    differs there, which is what is wrong and what is being used just now, once more with the counters' heads locked.
    """

    def __init__(
        self,
        *,
        store: ReconciliationStore,
        outcomes: OutcomeStore,
        counters: CounterClient,
        quota: QuotaClient,
        page_counters_max: int = PAGE_COUNTERS_MAX,
        page_seconds_max: float = PAGE_SECONDS_MAX,
    ) -> None:
        self._store = store
        self._outcomes = outcomes
        self._counters = counters
        self._quota = quota
        self._page_counters_max = page_counters_max
        self._page_seconds_max = page_seconds_max

    async def reconcile(self, org_id: OrgId, *, after: CounterKey | None, fixed_by: str | None) -> Reconciled:
        """Compare the counters of the next page: hours first, then days; after the last, what is stuck.

        Args:
            after: `next_after` of the page before; None: the first page.
            fixed_by: Who has what differs repaired; None: nobody.

        Raises:
            Unavailable: Some of the page may have been repaired. A retry is safe.
        """
        after = after or CounterKey.first(CounterUnit.HOUR)
        keys, suspects, last = await self._look(org_id, after)
        differences: list[Difference] = []
        ends = time.monotonic() + self._page_seconds_max
        while suspects:
            batch, suspects = suspects[:_COMPARED_AT_ONCE_MAX], suspects[_COMPARED_AT_ONCE_MAX:]
            differences += await self._compare(org_id, batch, fixed_by=fixed_by)
            if suspects and time.monotonic() > ends:
                last = batch[-1]
                keys = {key for key in keys if key <= last}
                break
        for difference in differences:
            _report(org_id, difference)
        if last is None and after.unit is CounterUnit.HOUR:
            last = CounterKey.first(CounterUnit.DAY)
        stuck = [] if last is not None else await self._settle_stuck(org_id, fix=fixed_by is not None)
        return Reconciled(len(keys), differences, stuck, last)

    async def audit_limits(self, org_id: OrgId, page_token: str) -> AuditedLimits:
        """Whether HARD limits were kept, which quota alone can tell; see `CounterClient.audit_limits`."""
        return await self._counters.audit_limits(org_id, page_token)

    async def _look(
        self, org_id: OrgId, after: CounterKey
    ) -> tuple[set[CounterKey], list[CounterKey], CounterKey | None]:
        """The next keys that quota or ingest have, those that differ at first sight, and the last of a full page."""
        limit = self._page_counters_max
        counters = await self._counters.list_counters(org_id, after=after, limit=limit)
        sums = await self._store.list_sums(org_id, after=after, limit=limit)
        # Where a side has more, only what lies before its last key is known of both.
        last = min((each[-1][0] for each in (counters, sums) if len(each) == limit), default=None)
        counted, stored = dict(counters), dict(sums)
        keys = {key for key in counted.keys() | stored.keys() if last is None or key <= last}
        zero = Decimal(0)
        return keys, sorted(key for key in keys if counted.get(key, zero) != stored.get(key, zero)), last

    async def _compare(self, org_id: OrgId, keys: Sequence[CounterKey], *, fixed_by: str | None) -> list[Difference]:
        differences = await self._compare_locked(org_id, keys, repaired_by=None)
        if not differences or fixed_by is None:
            return differences
        # A repair rests on the entries themselves, which are too many to be read under a lock: rollups
        # that are the sums of their entries stay so.
        wrong = [difference.key for difference in differences]
        contradicted = await self._store.find_contradicted(org_id, wrong)
        for key in contradicted:
            INVARIANT_VIOLATIONS.labels("I2").inc()
            log.error("rollup_contradicts_entries", org_id=str(org_id), **_fields(key))
        left = [difference for difference in differences if difference.key in contradicted]
        sound = [key for key in wrong if key not in contradicted]
        return left + (await self._compare_locked(org_id, sound, repaired_by=fixed_by) if sound else [])

    async def _compare_locked(
        self, org_id: OrgId, keys: Sequence[CounterKey], *, repaired_by: str | None
    ) -> list[Difference]:
        async def read_stored(reservation_ids: Sequence[ReservationId]) -> Stored:
            return await self._store.read_stored(org_id, keys, reservation_ids)

        return await self._counters.compare(org_id, keys, read_stored, repaired_by=repaired_by)

    async def _settle_stuck(self, org_id: OrgId, *, fix: bool) -> list[SettledReservation]:
        stuck = await self._counters.list_stuck(org_id, min_age_seconds=_STUCK_SECONDS, limit=_STUCK_MAX)
        ids = [each.reservation_id for each in stuck]
        committed = (await self._store.read_stored(org_id, [], ids)).committed
        settled = []
        for each in stuck:
            stored, fixed = each.reservation_id in committed, False
            if fix:
                outcome = await self._outcomes.decide(org_id, each.reservation_id)
                stored, fixed = outcome is Outcome.COMMITTED, await self._settle(org_id, each.reservation_id, outcome)
            log.warning(
                "reservation_stuck",
                org_id=str(org_id),
                reservation_id=str(each.reservation_id),
                stored=stored,
                fixed=fixed,
            )
            settled.append(SettledReservation(each, stored, fixed))
        return settled

    async def _settle(self, org_id: OrgId, reservation_id: ReservationId, outcome: Outcome) -> bool:
        try:
            await self._quota.settle([(org_id, reservation_id, outcome)])
        except Unavailable:
            raise
        except UsameterError as error:
            log.error("stuck_reservation_refused", reservation_id=str(reservation_id), error=str(error))
            return False
        return True


def _report(org_id: OrgId, difference: Difference) -> None:
    INVARIANT_VIOLATIONS.labels("I4").inc()
    log.error(
        "quota_counter_differs",
        org_id=str(org_id),
        **_fields(difference.key),
        counter=str(difference.counter),
        expected=str(difference.expected),
        fixed=difference.fixed,
    )


def _fields(key: CounterKey) -> dict[str, str]:
    return {
        "tenant_id": key.tenant_id,
        "event_type": key.event_type,
        "unit": key.unit.value,
        "start": key.start.isoformat(),
    }
