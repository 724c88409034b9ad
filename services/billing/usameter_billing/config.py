"""The environment of the billing service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from usameter_core.config import AddressSetting, InternalSettings


class BillingSettings(InternalSettings):
    """Read once at start-up."""

    identity_addr: AddressSetting
    ingest_addr: AddressSetting
    # Days from issue to the due date of an invoice.
    invoice_due_days: Annotated[int, Field(ge=0, le=365)] = 30
