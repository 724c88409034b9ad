"""The audit of limits: whether a HARD limit was kept, as far as what is stored allows to conclude (invariant I4)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from decimal import Decimal

from usameter_core.audit import VIOLATIONS_MAX, Violation, report_violations
from usameter_core.clock import Clock
from usameter_core.ids import OrgId
from usameter_quota.domain.auditing import Audited, AuditPlace, BoundUse, Stage, find_violation
from usameter_quota.store.auditing import AuditStore, LimitMoment

# Some seconds of work a page at most; the periods of one head are not divided.
HEADS_MAX = 5_000
PERIODS_MAX = 50_000
CHANGES_MAX = 10_000

_ZERO = Decimal(0)


class LimitAuditingService:
    """Holds an organization's counters against the HARD limits that bound them, a page at a time.

    A page reads limits and counters at one moment, without a lock. In memory are a batch of rows, or a page of
    changes, and the counters that look wrong.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        store: AuditStore,
        heads_max: int = HEADS_MAX,
        periods_max: int = PERIODS_MAX,
        changes_max: int = CHANGES_MAX,
    ) -> None:
        self._clock = clock
        self._store = store
        self._heads_max = heads_max
        self._periods_max = periods_max
        self._changes_max = changes_max
        # Of the pool's connections, which reservations need, audits have one at a time, whoever asks for them.
        self._turn = asyncio.Lock()

    async def audit(self, org_id: OrgId, place: AuditPlace) -> Audited:
        """Compare the next page.

        Raises:
            Unavailable: The database cannot be reached. A retry is safe.
        """
        async with self._turn, self._store.moment(org_id) as limits:
            match place.stage:
                case Stage.IN_FORCE:
                    audited = await self._audit_in_force(limits, place)
                case Stage.CHANGES:
                    audited = await self._audit_changes(limits, place)
        report_violations(org_id, audited.violations)
        return audited

    async def _audit_in_force(self, limits: LimitMoment, place: AuditPlace) -> Audited:
        last = (place.tenant_id, place.event_type)
        heads = checked = 0
        suspects: list[BoundUse] = []
        next_place = AuditPlace(Stage.CHANGES)
        stream = limits.stream_heads(after=last, limit=self._heads_max, now=self._clock.now())
        async with aclosing(stream):
            async for head, bound in stream:
                if head != last:
                    if checked >= self._periods_max or len(suspects) >= VIOLATIONS_MAX:
                        next_place = AuditPlace(Stage.IN_FORCE, *last)
                        break
                    heads, last = heads + 1, head
                if bound is not None:
                    checked += 1
                    if _looks_wrong(bound, changed=False):
                        suspects.append(bound)
            else:
                if heads == self._heads_max:
                    next_place = AuditPlace(Stage.IN_FORCE, *last)
        return Audited(checked, await _find_violations(limits, suspects, changed=False), next_place)

    async def _audit_changes(self, limits: LimitMoment, place: AuditPlace) -> Audited:
        after = (place.tenant_id, place.event_type, place.version)
        changes = await limits.list_changes(after=after, limit=self._changes_max)
        bound = [each for _, each in changes if each is not None]
        suspects = [each for each in bound if _looks_wrong(each, changed=True)]
        next_place = None
        if len(changes) == self._changes_max:
            next_place = AuditPlace(Stage.CHANGES, *changes[-1][0])
        return Audited(len(bound), await _find_violations(limits, suspects, changed=True), next_place)


def _looks_wrong(bound: BoundUse, *, changed: bool) -> bool:
    """Whether it is wrong, unless something else than admissions raised it."""
    return find_violation(bound, raised=_ZERO, changed=changed) is not None


async def _find_violations(limits: LimitMoment, suspects: Sequence[BoundUse], *, changed: bool) -> list[Violation]:
    """What is wrong of what looks so; the first so many."""
    if not suspects:
        return []
    found = [
        find_violation(bound, raised=raised, changed=changed)
        for bound, raised in zip(suspects, await limits.sum_raised(suspects), strict=True)
    ]
    return [each for each in found if each is not None][:VIOLATIONS_MAX]
