"""Price versions: adding, listing, and what a quantity would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from usameter_billing.store import prices as store
from usameter_billing.store import settings
from usameter_core.clock import Clock
from usameter_core.ids import OrgId, new_uuid
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_core.period import format_timestamp
from usameter_core.postgres.transaction import run_transaction
from usameter_proof.pricing import PriceTerms, PriceVersion, price_from_terms
from usameter_proof.rating import Rating, rate

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool


@dataclass(frozen=True, slots=True)
class Page:
    """Some versions, and the token of those after them; None on the last page."""

    versions: Sequence[PriceVersion]
    next_page_token: str | None


class Prices:
    """The prices of organizations."""

    def __init__(self, *, pool: Pool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def create(
        self, org_id: OrgId, *, event_type: str, tenant_id: str | None, effective_from: datetime, terms: PriceTerms
    ) -> tuple[PriceVersion, list[str]]:
        """Add a version, and say what it does not change.

        Raises:
            InvalidArgument: The terms are no price.
            AlreadyExists: A version stands at that moment.
            FailedPrecondition: CURRENCY_MISMATCH: the tenant's settings name another currency.
        """
        version = PriceVersion(
            price_id=new_uuid(),
            event_type=event_type,
            tenant_id=tenant_id,
            effective_from=effective_from,
            terms=terms,
            price=price_from_terms(terms),
            created_at=self._clock.now(),
        )

        async def work(connection: Connection) -> list[str]:
            if tenant_id is not None:
                of_tenant = await settings.load_settings(connection, org_id, [tenant_id])
                of_tenant[tenant_id].check_currency(version.price.currency, what="The price")
            await store.insert_price(connection, org_id, version)
            periods, first_start = await store.count_pinned(connection, org_id, version)
            if first_start is None:
                return []
            return [
                f"{periods} billed period(s), the first from {format_timestamp(first_start)}, keep the price "
                "version that billed them first"
            ]

        return version, await run_transaction(self._pool, work)

    async def list(self, org_id: OrgId, *, event_type: str, tenant_id: str, limit: int, page_token: str) -> Page:
        """Versions by (event_type, tenant_id, effective_from); empty filters pass all."""
        after = decode_page_token(page_token, tuple[str, str, datetime])
        versions = await run_transaction(
            self._pool,
            lambda connection: store.list_prices(
                connection, org_id, event_type=event_type, tenant_id=tenant_id, after=after, limit=limit + 1
            ),
        )
        if len(versions) <= limit:
            return Page(versions, None)
        last = versions[limit - 1]
        key = (last.event_type, last.tenant_id or "", format_timestamp(last.effective_from))
        return Page(versions[:limit], encode_page_token(key))

    def preview(self, terms: PriceTerms, quantity: Decimal) -> tuple[str, Rating]:
        """The currency and the rating of a quantity.

        Raises:
            InvalidArgument: The terms are no price.
        """
        price = price_from_terms(terms)
        return price.currency, rate(price, quantity)
