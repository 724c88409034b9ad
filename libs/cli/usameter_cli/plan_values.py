"""Plans and subscriptions as the API has them, as far as they are shown."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from usameter_cli.api import ApiClient, read_as

_PAGE_PLANS_MAX = 1_000


class Plan(msgspec.Struct, frozen=True):
    """A base fee for an interval, and prices."""

    id: str
    name: str
    base_fee: str
    currency: str
    interval: str
    prices: list[PlanPrice] = []


class PlanPrice(msgspec.Struct, frozen=True):
    """The price of an event type on the plan."""

    event_type: str
    price: Price


class Price(msgspec.Struct, frozen=True):
    """How a quantity becomes money."""

    model: str


class Phase(msgspec.Struct, frozen=True):
    """A plan from a moment on."""

    start_at: str
    plan_id: str


class Subscription(msgspec.Struct, frozen=True):
    """A tenant on plans over time."""

    id: str
    tenant_id: str
    plan_id: str
    start_at: str
    end_at: str | None = None
    phases: list[Phase] = []


class _Page(msgspec.Struct, frozen=True):
    plans: list[Plan]
    next_page_token: str | None = None


def list_all_plans(api: ApiClient) -> Iterator[Plan]:
    """Every plan of the organization, by name."""
    token: str | None = None
    while True:
        page = read_as(_Page, api.get("/api/v1/plans", {"limit": _PAGE_PLANS_MAX, "page_token": token}))
        yield from page.plans
        token = page.next_page_token
        if not token:
            return
