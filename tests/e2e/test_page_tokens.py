"""Whatever somebody sends for a page token, it is a page or an error that says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.proofs import Billed
from tests.support.stack import RunningStack
from tests.support.tokens import KeyShape

# Of REST: method, path, and what is in the tokens.
LISTS = {
    "events": ("GET", "/api/v1/events", KeyShape(("datetime", "uuid"))),
    "snapshot's events": ("GET", "/api/v1/snapshots/{snapshot}/events", KeyShape(("uuid", "bool"))),
    "epochs": ("GET", "/api/v1/ledger/epochs", KeyShape(("int",))),
    "audit of epochs": (
        "POST",
        "/api/v1/ledger:audit",
        KeyShape(("int", "int"), lambda found, epoch: [found, {"stage": "epochs", "epoch": epoch}]),
    ),
    "audit of days": (
        "POST",
        "/api/v1/ledger:audit",
        KeyShape(
            ("str", "datetime"), lambda tenant, moment: [0, {"stage": "days", "tenant_id": tenant, "moment": moment}]
        ),
    ),
    "audit of entries": (
        "POST",
        "/api/v1/ledger:audit",
        KeyShape(("datetime", "uuid"), lambda moment, id: [0, {"stage": "entries", "moment": moment, "event_id": id}]),
    ),
    "audit of quotas": (
        "POST",
        "/api/v1/quotas:audit",
        KeyShape(
            ("int", "str", "str", "datetime"),
            lambda found, tenant, kind, start: [
                found,
                {"tenant_id": tenant, "event_type": kind, "unit": "HOUR", "start": start},
            ],
        ),
    ),
    "reconciliation": (
        "POST",
        "/api/v1/quotas:reconcile",
        KeyShape(("str", "str", "datetime"), lambda tenant, kind, start: [tenant, kind, "DAY", start]),
    ),
    "audit of copies": (
        "POST",
        "/api/v1/invoices:audit",
        KeyShape(("int", "int"), lambda found, epoch: [found, {"stage": "ledger", "epoch": epoch}]),
    ),
    "audit of tenants": (
        "POST",
        "/api/v1/invoices:audit",
        KeyShape(("str",), lambda tenant: [0, {"stage": "tenants", "tenant_id": tenant}]),
    ),
    "audit of invoices": (
        "POST",
        "/api/v1/invoices:audit",
        KeyShape(("int",), lambda number: [0, {"stage": "invoices", "number": number}]),
    ),
    "invoices": ("GET", "/api/v1/invoices", KeyShape(("uuid",))),
    "invoice's events": (
        "GET",
        "/api/v1/invoices/{invoice}/events",
        KeyShape(("int", "str", "date", "uuid", "bool")),
    ),
    "invoice's proof": ("GET", "/api/v1/invoices/{invoice}/proof", KeyShape(("int", "str", "date", "int", "int"))),
    "credit notes": ("GET", "/api/v1/credit-notes", KeyShape(("int",))),
    "credit balances": ("GET", "/api/v1/credit-balances", KeyShape(("str", "str"))),
    "credit entries": ("GET", "/api/v1/credit-entries?tenant_id=acme", KeyShape(("uuid",))),
    "prices": ("GET", "/api/v1/prices", KeyShape(("str", "str", "datetime"))),
    "plans": ("GET", "/api/v1/plans", KeyShape(("str",))),
    "subscriptions": ("GET", "/api/v1/subscriptions", KeyShape(("uuid",))),
    "quotas": ("GET", "/api/v1/quotas", KeyShape(("str", "str"))),
    "quota events": ("GET", "/api/v1/quota-events", KeyShape(("int",))),
    "tenants": ("GET", "/api/v1/tenants", KeyShape(("str",))),
    "API keys": ("GET", "/api/v1/api-keys", KeyShape(("uuid",))),
}


@pytest.mark.parametrize("of", LISTS)
async def test_a_token_that_no_list_can_have_returned_is_an_invalid_argument(
    stack: RunningStack, billed: Billed, of: str
) -> None:
    method, path, shape = LISTS[of]
    answers = await asyncio.to_thread(ask, stack, billed, method, path, shape.impossible_tokens())
    for token, answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_ARGUMENT"), (token, answer.text)


@pytest.mark.parametrize("of", LISTS)
async def test_a_token_at_the_end_of_what_there_is_is_answered(stack: RunningStack, billed: Billed, of: str) -> None:
    method, path, shape = LISTS[of]
    answers = await asyncio.to_thread(ask, stack, billed, method, path, shape.extreme_tokens())
    for token, answer in answers:
        assert answer.status_code in {200, 400}, (token, answer.text)


def ask(
    stack: RunningStack, billed: Billed, method: str, path: str, tokens: Iterator[str]
) -> list[tuple[str, httpx.Response]]:
    snapshot = billed.first["lines"][0]["snapshots"][0]["id"]
    asked: list[tuple[str, httpx.Response]] = []
    with stack.client() as client:
        url = client.base_url.join(path.format(invoice=billed.true_up["id"], snapshot=snapshot))
        for token in tokens:
            options: dict[str, Any] = {"json": {"page_token": token}}
            if method == "GET":
                options = {"params": {**url.params, "page_token": token}}
            asked.append((token, client.request(method, url, **options)))
    return asked
