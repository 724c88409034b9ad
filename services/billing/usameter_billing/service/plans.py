"""Plans: adding and listing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from usameter_billing.domain.plan import SEEDED_PLANS, Plan, PlanTerms, plan_prices_from_terms
from usameter_billing.store import plans as store
from usameter_core.clock import Clock
from usameter_core.errors import AlreadyExists
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_core.postgres.transaction import run_transaction
from usameter_proof.pricing import PriceVersion

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool


@dataclass(frozen=True, slots=True)
class Page:
    """Some plans, and the token of those after them; None on the last page."""

    plans: Sequence[Plan]
    next_page_token: str | None


class Plans:
    """The plans of organizations."""

    def __init__(self, *, pool: Pool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def create(self, org_id: OrgId, terms: PlanTerms) -> Plan:
        """Add a plan.

        Raises:
            InvalidArgument: The terms are no plan.
            AlreadyExists: The organization has one of that name.
        """
        plan = _plan_from_terms(terms, created_at=self._clock.now())

        async def work(connection: Connection) -> None:
            if await store.insert_plans(connection, org_id, [plan]):
                return
            existing = await store.find_plan_id(connection, org_id, name=plan.name)
            assert existing is not None
            raise AlreadyExists(
                "plan",
                format_id("pln", existing),
                f"A plan {plan.name} exists already; plans are not edited, add one of another name",
            )

        await run_transaction(self._pool, work)
        return plan

    async def list(self, org_id: OrgId, *, limit: int, page_token: str) -> Page:
        """Plans by name. The published ones are there from the first list on."""
        after = decode_page_token(page_token, tuple[str])

        async def work(connection: Connection) -> Sequence[Plan]:
            if after is None:
                now = self._clock.now()
                seeded = [_plan_from_terms(terms, created_at=now) for terms in SEEDED_PLANS]
                await store.insert_plans(connection, org_id, seeded)
            return await store.list_plans(connection, org_id, after=after[0] if after else "", limit=limit + 1)

        plans = await run_transaction(self._pool, work)
        if len(plans) <= limit:
            return Page(plans, None)
        return Page(plans[:limit], encode_page_token((plans[limit - 1].name,)))


def _plan_from_terms(terms: PlanTerms, *, created_at: datetime) -> Plan:
    prices = plan_prices_from_terms(terms)
    plan_id = new_uuid()
    versions = [
        PriceVersion(new_uuid(), event_type, None, created_at, written, price, created_at, plan_id)
        for (event_type, written), price in zip(terms.prices, prices, strict=True)
    ]
    return Plan(
        plan_id=plan_id,
        name=terms.name,
        base_fee=Decimal(terms.base_fee),
        currency=terms.currency,
        interval=terms.interval,
        prices=tuple(sorted(versions, key=lambda version: version.event_type)),
        created_at=created_at,
    )
