"""Subscriptions: starting, ending and changing them, as far as nothing invoiced is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.domain.plan import Plan
from usameter_billing.domain.subscription import Phase, Subscription
from usameter_billing.domain.tiling import Tiling
from usameter_billing.store import accounts, drafts, invoices, ledger, plans, settings
from usameter_billing.store import subscriptions as store
from usameter_core.clock import Clock
from usameter_core.errors import AlreadyExists, FailedPrecondition, FieldViolation, InvalidArgument, NotFound
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.logging import get_logger
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_core.period import add_months, day_period, day_start, format_timestamp
from usameter_core.postgres.transaction import run_transaction

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

log = get_logger()

# A year's interval that begins at the last moment we take still ends within the calendar, and so does the next.
_MONTHS_TO_COME = 24


@dataclass(frozen=True, slots=True)
class Page:
    """Some subscriptions, and the token of those after them; None on the last page."""

    subscriptions: Sequence[Subscription]
    next_page_token: str | None


@dataclass(frozen=True, slots=True)
class Moment:
    """When a change comes into force: `at`, else the next UTC midnight (`at_once`), else with the running interval."""

    at_once: bool
    at: datetime | None

    def of(self, subscription: Subscription, *, now: datetime) -> datetime:
        """The UTC midnight that is meant.

        Raises:
            InvalidArgument: Both are given, or `at` is no midnight or lies before the start.
        """
        if self.at is None:
            midnight = day_period(now.date()).end
            return max(midnight if self.at_once else subscription.interval_end(now), subscription.start)
        if self.at_once:
            raise InvalidArgument([FieldViolation("at", "is given together with at_once")])
        if _midnight(self.at, field="at") < subscription.start:
            start = format_timestamp(subscription.start)
            raise InvalidArgument([FieldViolation("at", f"lies before the start of the subscription, {start}")])
        return self.at


class Subscriptions:
    """The subscriptions of organizations' tenants.

    Every change locks the tenant's account, as whoever bills it does, and then the ledger's cursor, as whoever
    notes new use by period does.
    """

    def __init__(self, *, pool: Pool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def create(self, org_id: OrgId, *, tenant_id: str, plan_id: UUID, start_at: datetime | None) -> Subscription:
        """Put a tenant on a plan, from the midnight `start_at` on or from the one that began today.

        Raises:
            InvalidArgument: `start_at` is no UTC midnight.
            NotFound: There is no such plan.
            AlreadyExists: Another subscription covers a part of the time; the same one is answered as it is.
            FailedPrecondition: PERIOD_INVOICED, CURRENCY_MISMATCH.
        """
        now = self._clock.now()
        start = day_start(now) if start_at is None else _midnight(start_at, field="start_at")

        async def work(connection: Connection) -> Subscription:
            held = await _lock_held(connection, org_id, tenant_id)
            plan = await _load_plan(connection, org_id, tenant_id, plan_id)
            for each in held:
                # None that never began: it stands in nobody's way.
                if each.start != each.end and (each.end is None or each.end > start):
                    found = each.start == start if start_at else each.holds(start)
                    if found and each.plan_at(start).plan_id == plan_id:
                        return each
                    raise _overlap(each)
            added = Subscription(new_uuid(), tenant_id, start, None, (Phase(start, plan),), now)
            await _apply(connection, org_id, held, added, moment=start)
            return added

        return await run_transaction(self._pool, work)

    async def get(self, org_id: OrgId, subscription_id: UUID) -> Subscription:
        """A subscription with its phases.

        Raises:
            NotFound: There is none with this id.
        """
        return await run_transaction(self._pool, lambda connection: _load(connection, org_id, subscription_id))

    async def list(self, org_id: OrgId, *, tenant_id: str, limit: int, page_token: str) -> Page:
        """Subscriptions, newest first; an empty filter passes all."""
        before = decode_page_token(page_token, tuple[UUID])
        found = await run_transaction(
            self._pool,
            lambda connection: store.list_subscriptions(
                connection, org_id, tenant_id=tenant_id, before=before[0] if before else None, limit=limit + 1
            ),
        )
        if len(found) <= limit:
            return Page(found, None)
        return Page(found[:limit], encode_page_token((str(found[limit - 1].subscription_id),)))

    async def cancel(self, org_id: OrgId, subscription_id: UUID, moment: Moment) -> Subscription:
        """End a subscription; an end that it has already is never moved later.

        Raises:
            InvalidArgument: The moment is none.
            NotFound: There is no such subscription.
            FailedPrecondition: PERIOD_INVOICED; SUBSCRIPTION_ENDED: it ends before `moment.at`.
        """
        now = self._clock.now()

        async def work(connection: Connection) -> Subscription:
            known, held = await _lock(connection, org_id, subscription_id)
            end = moment.of(known, now=now)
            if moment.at is not None and known.end is not None and end > known.end:
                raise _ended(known)
            ended = known.ended(end)
            if ended != known:
                await _apply(connection, org_id, held, ended, moment=end)
            return ended

        return await run_transaction(self._pool, work)

    async def change_plan(self, org_id: OrgId, subscription_id: UUID, *, plan_id: UUID, moment: Moment) -> Subscription:
        """Put the tenant on another plan from the moment on, instead of all changes planned from there on.

        Raises:
            InvalidArgument: The moment is none.
            NotFound: There is no such subscription, or no such plan.
            FailedPrecondition: PERIOD_INVOICED, CURRENCY_MISMATCH; SUBSCRIPTION_ENDED: it has ended by then.
        """
        now = self._clock.now()

        async def work(connection: Connection) -> Subscription:
            known, held = await _lock(connection, org_id, subscription_id)
            plan = await _load_plan(connection, org_id, known.tenant_id, plan_id)
            start = moment.of(known, now=now)
            if known.end is not None and start >= known.end:
                raise _ended(known)
            changed = known.changed(plan, start)
            if changed != known:
                await _apply(connection, org_id, held, changed, moment=start)
            return changed

        return await run_transaction(self._pool, work)


async def _apply(
    connection: Connection, org_id: OrgId, held: Sequence[Subscription], changed: Subscription, *, moment: datetime
) -> None:
    """Write the subscription and cut the tenant's time anew, from the period on that holds the moment."""
    tenant_id = changed.tenant_id
    invoiced_until = await invoices.load_invoiced_until(connection, org_id, tenant_id)
    if invoiced_until is not None and moment < invoiced_until:
        raise FailedPrecondition(
            "PERIOD_INVOICED",
            f"{tenant_id} is invoiced until {format_timestamp(invoiced_until)}; "
            f"nothing can change at {format_timestamp(moment)} any more",
        )
    await store.save_subscription(connection, org_id, changed)
    others = [each for each in held if each.subscription_id != changed.subscription_id]
    before, after = Tiling(held), Tiling([*others, changed])
    since = before.period_of(moment).start
    await ledger.recut_periods(connection, org_id, tenant_id, tiling=after, since=since)
    found = await drafts.load_draft_periods(connection, org_id, tenant_id, since=since)
    stale = [invoice_id for invoice_id, period in found if after.period_of(period.start) != period]
    await drafts.delete_drafts(connection, org_id, stale)
    log.info(
        "subscription_changed",
        subscription_id=format_id("sub", changed.subscription_id),
        from_moment=format_timestamp(moment),
        phases=len(changed.phases),
        ends=changed.end is not None,
    )


async def _lock_held(connection: Connection, org_id: OrgId, tenant_id: str) -> tuple[Subscription, ...]:
    """All subscriptions of a tenant whose account, and the cursor, is locked to the end of the transaction."""
    await accounts.lock_accounts(connection, org_id, [tenant_id])
    await ledger.lock_cursor(connection, org_id)
    held = await store.load_subscriptions(connection, org_id, [tenant_id])
    return held.get(tenant_id, ())


async def _lock(
    connection: Connection, org_id: OrgId, subscription_id: UUID
) -> tuple[Subscription, tuple[Subscription, ...]]:
    """The subscription, and all of its tenant's; locked as by `_lock_held`."""
    tenant_id = (await _load(connection, org_id, subscription_id)).tenant_id
    held = await _lock_held(connection, org_id, tenant_id)
    return next(each for each in held if each.subscription_id == subscription_id), held


async def _load(connection: Connection, org_id: OrgId, subscription_id: UUID) -> Subscription:
    subscription = await store.load_subscription(connection, org_id, subscription_id)
    if subscription is None:
        raise NotFound("subscription", format_id("sub", subscription_id))
    return subscription


async def _load_plan(connection: Connection, org_id: OrgId, tenant_id: str, plan_id: UUID) -> Plan:
    """The plan, which the tenant's settings let it be on."""
    plan = (await plans.load_plans(connection, org_id, [plan_id])).get(plan_id)
    if plan is None:
        raise NotFound("plan", format_id("pln", plan_id))
    of_tenant = await settings.load_settings(connection, org_id, [tenant_id])
    of_tenant[tenant_id].check_currency(plan.currency, what=f"The plan {plan.name}")
    return plan


def _midnight(moment: datetime, *, field: str) -> datetime:
    if moment != day_start(moment):
        raise InvalidArgument([FieldViolation(field, 'must be a UTC midnight, such as "2026-01-31T00:00:00Z"')])
    try:
        add_months(moment, _MONTHS_TO_COME)
    except OverflowError:
        raise InvalidArgument([FieldViolation(field, "is beyond the calendar")]) from None
    return moment


def _overlap(existing: Subscription) -> AlreadyExists:
    public_id = format_id("sub", existing.subscription_id)
    until = "on" if existing.end is None else f"to {format_timestamp(existing.end)}"
    return AlreadyExists(
        "subscription",
        public_id,
        f"{existing.tenant_id} has {public_id} from {format_timestamp(existing.start)} {until}; "
        "change its plan, or cancel it first",
    )


def _ended(subscription: Subscription) -> FailedPrecondition:
    assert subscription.end is not None
    return FailedPrecondition(
        "SUBSCRIPTION_ENDED",
        f"{format_id('sub', subscription.subscription_id)} ends at {format_timestamp(subscription.end)}",
    )
