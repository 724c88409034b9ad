"""How a tenant is billed."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from usameter_core.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """A tenant's settings; the defaults are those of a tenant without any.

    Attributes:
        currency: In which its own prices and its plans must be; None: any.
        tax_rate: Percent.
        due_days: From issue to the due date; None: the default of the deployment.
        address: Name and address, as they are printed.
    """

    currency: str | None = None
    tax_rate: Decimal = Decimal(0)
    due_days: int | None = None
    address: str = ""

    def check_currency(self, currency: str, *, what: str) -> None:
        """Let `what` be in `currency`.

        Raises:
            FailedPrecondition: CURRENCY_MISMATCH: the settings name another.
        """
        if self.currency is not None and self.currency != currency:
            raise FailedPrecondition(
                "CURRENCY_MISMATCH",
                f"{what} is in {currency}, but the tenant's billing settings name {self.currency}",
            )
