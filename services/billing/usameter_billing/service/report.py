"""The billing report of an organization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from usameter_billing.domain.report import CurrencyReport
from usameter_billing.store import report as store
from usameter_core.clock import Clock
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.ids import OrgId
from usameter_core.period import Period
from usameter_core.postgres.transaction import run_transaction

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Pool


class BillingReports:
    """Sums over the invoices of organizations."""

    def __init__(self, *, pool: Pool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def get(self, org_id: OrgId, *, starting_in: Period) -> Sequence[CurrencyReport]:
        """By currency code, the sums over invoices whose billing period starts within `starting_in`, as of now.

        Raises:
            InvalidArgument: It ends before it begins.
        """
        if starting_in.end <= starting_in.start:
            raise InvalidArgument([FieldViolation("period_end", "must be after period_start")])
        now = self._clock.now()
        return await run_transaction(
            self._pool,
            lambda connection: store.load_report(connection, org_id, starting_in=starting_in, now=now),
        )
