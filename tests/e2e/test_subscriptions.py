"""A tenant on a published plan, from the command line to the invoice, over the public interfaces only."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.stack import RunningStack

TENANT = "subscribed"


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def shown(stack: RunningStack, *arguments: str) -> str:
    process = stack.command(*arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    return output.decode()


def bill(client: httpx.Client, start: str, end: str) -> Any:
    period = {"period_start": f"{start}T00:00:00Z", "period_end": f"{end}T00:00:00Z"}
    draft = post(client, "/api/v1/invoices", {"tenant_id": TENANT, **period})
    return post(client, f"/api/v1/invoices/{draft['id']}:finalize", {})


def amounts(invoice: Any) -> list[tuple[str, str, str]]:
    return [
        (line["kind"], line.get("event_type") or line["base_fee"]["plan_name"], line["amount"])
        for line in invoice["lines"]
    ]


def test_a_tenant_subscribes_uses_changes_and_leaves(stack: RunningStack) -> None:
    client = stack.client()
    plans = {plan["name"]: plan for plan in stack.json("plans", "list")["plans"]}
    assert {"Starter", "Growth", "Enterprise"} <= set(plans)
    assert plans["Starter"]["interval"] == "MONTHLY"
    listing = shown(stack, "plans", "list")
    assert "Starter" in listing and "api_request (graduated)" in listing

    settings = client.put(
        f"/api/v1/billing-settings/{TENANT}", json={"tax_rate": "20", "due_days": 10, "currency": "USD"}
    )
    assert settings.json() == {
        "tenant_id": TENANT,
        "currency": "USD",
        "tax_rate": "20",
        "due_days": 10,
        "address": "",
    }
    assert client.get("/api/v1/billing-settings/nobody").json() == {
        "tenant_id": "nobody",
        "currency": None,
        "tax_rate": "0",
        "due_days": None,
        "address": "",
    }

    create = ("subscriptions", "create", "--tenant", TENANT, "--plan", "Starter", "--start", "2024-01-31")
    subscription = stack.json(*create)
    assert stack.json(*create) == subscription
    assert (subscription["plan_id"], subscription["end_at"]) == (plans["Starter"]["id"], None)
    unknown = stack.command("subscriptions", "create", "--tenant", TENANT, "--plan", "Nope")
    _, errors = unknown.communicate(timeout=120)
    assert unknown.returncode == 1 and b"No plan 'Nope'; there are: " in errors
    body = {"tenant_id": TENANT, "plan_id": plans["Growth"]["id"]}
    assert client.post("/api/v1/subscriptions", json=body).json()["code"] == "ALREADY_EXISTS"

    for day, quantity in (("2024-02-28", 101_000), ("2024-02-29", 100_001)):
        event = {
            "event_type": "api_request",
            "tenant_id": TENANT,
            "quantity": quantity,
            "timestamp": f"{day}T12:00:00Z",
            "idempotency_key": f"subscribed-{day}",
        }
        post(client, "/api/v1/events", event)
    stack.seal()
    generate = ("invoices", "generate", "--tenant", TENANT, "--finalize", "--period")
    refused_month = stack.command(*generate, "2024-02")
    _, errors = refused_month.communicate(timeout=120)
    assert refused_month.returncode == 1
    assert b"[2024-01-31T00:00:00Z, 2024-02-29T00:00:00Z)" in errors
    invoice = stack.json(*generate, "2024-01-31..2024-02-29")
    # Two months in advance, since nobody invoiced the days before the start; and 1,000 beyond the included ones.
    assert amounts(invoice) == [
        ("BASE_FEE", "Starter", "29.00"),
        ("BASE_FEE", "Starter", "29.00"),
        ("USAGE", "api_request", "0.50"),
    ]
    assert (invoice["subtotal"], invoice["tax"], invoice["total"]) == ("58.50", "11.70", "70.20")
    fee = invoice["lines"][0]
    assert "price" not in fee and "quantity" not in fee and "event_type" not in fee
    assert fee["base_fee"] == {
        "subscription_id": subscription["id"],
        "plan_id": plans["Starter"]["id"],
        "plan_name": "Starter",
        "interval": "MONTHLY",
        "amount": "29",
        "seconds": 29 * 86_400,
        "interval_seconds": 29 * 86_400,
    }
    assert client.get(f"/api/v1/invoices/{invoice['id']}").json() == invoice
    table = shown(stack, "invoices", "show", invoice["id"])
    assert "Starter, BASE_FEE 2024-01-31 to 2024-02-29" in table and "29 of 29 days" in table

    refused = client.post(
        f"/api/v1/subscriptions/{subscription['id']}:cancel", json={"at": "2024-02-28T00:00:00Z"}
    ).json()
    assert (refused["code"], refused["details"]["condition"]) == ("FAILED_PRECONDITION", "PERIOD_INVOICED")
    changed = stack.json("subscriptions", "change-plan", subscription["id"], "--plan", "Growth", "--at", "2024-03-10")
    assert [phase["start_at"] for phase in changed["phases"]] == ["2024-01-31T00:00:00Z", "2024-03-10T00:00:00Z"]
    ended = stack.json("subscriptions", "cancel", subscription["id"], "--at", "2024-03-20")
    assert stack.json("subscriptions", "cancel", subscription["id"]) == ended
    assert stack.json("subscriptions", "show", subscription["id"]) == ended
    history = shown(stack, "subscriptions", "show", subscription["id"])
    assert "Starter" in history and "Growth" in history and "2024-03-20" in history
    assert client.get("/api/v1/subscriptions", params={"tenant_id": TENANT}).json() == {"subscriptions": [ended]}

    # 10 of 31 days of Starter stay charged, one event beyond the included 100,000 costs less than half a cent,
    # and 10 of 31 days of Growth come with it.
    stub = bill(client, "2024-02-29", "2024-03-10")
    assert amounts(stub) == [
        ("TRUE_UP", "Starter", "-19.65"),
        ("BASE_FEE", "Growth", "31.94"),
        ("USAGE", "api_request", "0.00"),
    ]
    assert (stub["subtotal"], stub["tax"], stub["total"]) == ("12.29", "2.46", "14.75")
    client.close()
