"""What a tenant owes that was not billed: one computation for previews, drafts and finalizing.

A line is `due − billed` for one event type and period, so late events, corrections and voids become
exact differences, and the lines of a period always add up to its rating (invariant I6). Base fees are
computed alike, in `base_fees`.
"""

from __future__ import annotations

import decimal
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from uuid import UUID

from usameter_billing.domain.base_fees import BilledFee, due_fee_lines
from usameter_billing.domain.invoice import BilledLine, DueInvoice, DueLine, LineKind, UseCharge
from usameter_billing.domain.plan import Plan
from usameter_billing.domain.subscription import Subscription, subscribed_plan
from usameter_billing.domain.tiling import Tiling
from usameter_core.decimals import CONTEXT, exact_sum
from usameter_core.period import Period
from usameter_proof.pricing import PriceVersion
from usameter_proof.rating import due_amount

_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class PeriodUse:
    """The sealed use of one event type in one period.

    Attributes:
        quantity: Of all snapshots of the period, covered or not.
        snapshot_ids: Those that no invoice covers yet.
        billed: Its finalized lines, oldest first, void ones left out.
        pinned_price_id: The price version of the oldest of them; None where there is none.
        pinned_tax_rate: Percent; of the oldest line of the period, whatever its event type.
    """

    event_type: str
    period: Period
    quantity: Decimal
    snapshot_ids: tuple[UUID, ...]
    billed: tuple[BilledLine, ...] = ()
    pinned_price_id: UUID | None = None
    pinned_tax_rate: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What there is to know of a tenant beside its use.

    Attributes:
        subscriptions: All of the tenant's, ascending.
        billed_fees: All that was billed of their base fees.
        tax_rate: Percent, for what was not billed before.
    """

    subscriptions: tuple[Subscription, ...] = ()
    billed_fees: tuple[BilledFee, ...] = ()
    tax_rate: Decimal = _ZERO


@dataclass(frozen=True, slots=True)
class Assessment:
    """What is due of one tenant: an invoice per currency, by currency code.

    `unpriced` are the uses, of any period, that have no price: not billed and not covered.
    """

    tenant_id: str
    invoices: tuple[DueInvoice, ...]
    unpriced: tuple[PeriodUse, ...]


class PriceBook:
    """The price versions of an organization, or those of them that matter."""

    def __init__(self, versions: Iterable[PriceVersion]) -> None:
        self._by_id: dict[UUID, PriceVersion] = {}
        self._of_plans: dict[tuple[str, UUID], PriceVersion] = {}
        self._by_subject: dict[tuple[str, str | None], list[PriceVersion]] = defaultdict(list)
        for version in sorted(versions, key=lambda version: version.effective_from):
            self._by_id[version.price_id] = version
            if version.plan_id is None:
                self._by_subject[version.event_type, version.tenant_id].append(version)
            else:
                self._of_plans[version.event_type, version.plan_id] = version

    def price_of(self, use: PeriodUse, *, tenant_id: str, plan: Plan | None) -> PriceVersion | None:
        """The version that billed the period first, else the one in force when the period began.

        That is the price of the `plan` that the tenant is on then, else the tenant's own, else the default.
        """
        if use.pinned_price_id is not None:
            return self._by_id[use.pinned_price_id]
        if plan is not None and (of_plan := self._of_plans.get((use.event_type, plan.plan_id))):
            return of_plan
        moment = use.period.start
        return self._in_force(use.event_type, tenant_id, moment) or self._in_force(use.event_type, None, moment)

    def _in_force(self, event_type: str, tenant_id: str | None, moment: datetime) -> PriceVersion | None:
        versions = self._by_subject.get((event_type, tenant_id), [])
        index = bisect_right(versions, moment, key=lambda version: version.effective_from)
        return versions[index - 1] if index else None


def standing_uses(subscriptions: Sequence[Subscription], *, through: Period) -> Iterator[tuple[str, Period]]:
    """The event types and periods, up to `through`, that a plan charges for without any use."""
    tiling = Tiling(subscriptions)
    for subscription in subscriptions:
        for span in subscription.spans():
            charged = [each for each in span.plan.prices if due_amount(each.price, _ZERO, subscribed=True)]
            if not charged:
                continue
            moment = span.start
            while moment <= through.start and (span.end is None or moment < span.end):
                period = tiling.period_of(moment)
                yield from ((price.event_type, period) for price in charged)
                moment = period.end


def compute_invoices(
    tenant_id: str, uses: Sequence[PeriodUse], *, period: Period, prices: PriceBook, standing: Standing
) -> Assessment:
    """What the tenant owes on the invoice of `period`.

    Args:
        tenant_id: Whose use it is.
        uses: Of `period` and of earlier ones: all with uncovered snapshots, and `standing_uses`.
        period: The billing period that is invoiced.
        prices: Every version of the event types in `uses`, for this tenant, for all, and of its plans.
        standing: Of the tenant.
    """
    lines: dict[str, list[DueLine]] = defaultdict(list)
    unpriced = []
    with decimal.localcontext(CONTEXT):
        for line in due_fee_lines(
            standing.subscriptions, standing.billed_fees, until=period.end, tax_rate=standing.tax_rate
        ):
            lines[line.charge.currency].append(line)
        for use in sorted(uses, key=lambda use: (use.period.start != period.start, use.period.start, use.event_type)):
            plan = subscribed_plan(standing.subscriptions, use.period.start)
            version = prices.price_of(use, tenant_id=tenant_id, plan=plan)
            if version is None:
                unpriced.append(use)
                continue
            line = _due_line(use, version, invoiced=period, tax_rate=standing.tax_rate)
            # Snapshots that change no amount get a line all the same: it covers them, so that they are
            # accounted for (I6) and the same use is not looked at for ever.
            if line.amount or line.snapshot_ids:
                lines[version.price.currency].append(line)
    missing = tuple(use.event_type for use in unpriced if use.period == period)
    return Assessment(
        tenant_id,
        tuple(DueInvoice(tenant_id, period, currency, tuple(lines[currency]), missing) for currency in sorted(lines)),
        tuple(unpriced),
    )


def _due_line(use: PeriodUse, version: PriceVersion, *, invoiced: Period, tax_rate: Decimal) -> DueLine:
    rated = due_amount(version.price, use.quantity, subscribed=version.plan_id is not None)
    return DueLine(
        kind=LineKind.USAGE if use.period == invoiced and not use.billed else LineKind.TRUE_UP,
        period=use.period,
        charge=UseCharge(use.event_type, version, use.quantity),
        tax_rate=tax_rate if use.pinned_tax_rate is None else use.pinned_tax_rate,
        rated_amount=rated,
        amount=CONTEXT.subtract(rated, exact_sum(line.amount for line in use.billed)),
        previously_billed=use.billed,
        snapshot_ids=use.snapshot_ids,
    )
