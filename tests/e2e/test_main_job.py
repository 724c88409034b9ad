"""The main job: a log of real requests in, exact invoices out, over the public interfaces only."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.access_log import PRICES, REAL_LOG, access_log, expected_of, line_amount, read_log
from tests.support.stack import RunningStack
from usameter_devstack.ports import free_port

MAY = {"start_date": "2015-05-01T00:00:00Z", "end_date": "2015-06-01T00:00:00Z"}
TENANT = "66.249.73.135"


@pytest.fixture(scope="module")
def log_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return access_log(tmp_path_factory.mktemp("log"))


def set_prices(client: httpx.Client) -> None:
    for event_type, tiers in PRICES.items():
        price = {
            "model": "graduated",
            "currency": "USD",
            "tiers": [{"up_to": up_to, "unit_amount": rate} for up_to, rate in tiers],
        }
        body = {"event_type": event_type, "effective_from": "2015-01-01T00:00:00Z", "price": price}
        assert client.post("/api/v1/prices", json=body).status_code == 200


def usage(client: httpx.Client) -> dict[str, tuple[str, int]]:
    answer = client.get("/api/v1/usage", params=MAY)
    assert answer.status_code == 200, answer.text
    return {row["event_type"]: (row["total_quantity"], row["event_count"]) for row in answer.json()["usage"]}


def all_invoices(client: httpx.Client) -> list[dict[str, Any]]:
    """Of the period; other tests of the platform have invoices of theirs."""
    filters = {"period_start": MAY["start_date"]}
    found: list[dict[str, Any]] = []
    token: str | None = ""
    while token is not None:
        page = client.get("/api/v1/invoices", params={**filters, "limit": "1000", "page_token": token}).json()
        found += page["invoices"]
        token = page.get("next_page_token")
    return found


def canonical(value: Decimal) -> str:
    return re.sub(r"\.?0+$", "", f"{value:.6f}")


def test_a_log_becomes_usage_and_usage_becomes_exact_invoices(stack: RunningStack, log_path: Path) -> None:
    expected = expected_of(read_log(log_path))
    client = stack.client()
    stack.seal()  # what other tests have left open

    first = stack.json("events", "import", str(log_path))
    assert (first["lines"], first["new"]) == (10_000, expected.requests + expected.transfers)
    again = stack.json("events", "import", str(log_path))
    assert (again["new"], again["duplicates"]) == (0, expected.requests + expected.transfers)
    egress = canonical(expected.total_quantity("egress_mb"))
    assert usage(client) == {
        "api_request": (str(expected.requests), expected.requests),
        "egress_mb": (egress, expected.transfers),
    }

    set_prices(client)
    (sealed,) = stack.seal()
    assert sealed["entry_count"] == expected.requests + expected.transfers
    made = stack.json("invoices", "generate", "--period", "2015-05", "--finalize")
    assert made["problems"] == []

    invoices = all_invoices(client)
    totals = {invoice["tenant_id"]: Decimal(invoice["total"]) for invoice in invoices}
    assert totals == {tenant: expected.invoice_total(tenant) for tenant in expected.use}
    assert_gapless(invoices)
    if log_path == REAL_LOG:
        # The figures of the log itself, as they are published with it.
        assert (expected.requests, expected.transfers, expected.tenants) == (10_000, 9_331, 1_753)
        assert egress == "2747.28274"
        assert sum(totals.values()) == Decimal("360.05")
        assert totals[TENANT] == Decimal("10.61")

    (invoice,) = [invoice for invoice in invoices if invoice["tenant_id"] == TENANT]
    shown = client.get(f"/api/v1/invoices/{invoice['id']}").json()
    assert {line["event_type"]: Decimal(line["amount"]) for line in shown["lines"]} == {
        kind: line_amount(kind, quantity) for kind, quantity in expected.use[TENANT].items()
    }
    for line in shown["lines"]:
        assert sum(Decimal(snapshot["total"]) for snapshot in line["snapshots"]) == Decimal(line["quantity"])

    # Generating again changes nothing.
    stack.json("invoices", "generate", "--period", "2015-05", "--finalize")
    assert all_invoices(client) == invoices
    body = {"tenant_id": TENANT, "period_start": MAY["start_date"], "period_end": MAY["end_date"]}
    assert client.post("/api/v1/invoices", json=body).json() == shown

    check_events_show_their_invoice(client, shown["id"])
    check_late_event_makes_a_true_up(stack, client, expected.use[TENANT]["api_request"])


def check_events_show_their_invoice(client: httpx.Client, invoice_id: str) -> None:
    deadline = time.monotonic() + 15
    while True:
        (event,) = client.get("/api/v1/events", params={"tenant_id": TENANT, "limit": "1"}).json()["events"]
        if event["invoice_id"] is not None:
            break
        assert time.monotonic() < deadline, "events never learnt of their invoice"
        time.sleep(0.1)
    assert event["invoice_id"] == invoice_id and event["billed_at"] is not None


def check_late_event_makes_a_true_up(stack: RunningStack, client: httpx.Client, billed: Decimal) -> None:
    late = {
        "event_type": "api_request",
        "tenant_id": TENANT,
        "quantity": 7,
        "idempotency_key": "late",
        "timestamp": "2015-05-31T23:59:59.999999Z",
    }
    assert client.post("/api/v1/events", json=late).status_code == 200
    stack.seal()
    body = {"tenant_id": TENANT, "period_start": MAY["start_date"], "period_end": MAY["end_date"]}
    draft = client.post("/api/v1/invoices", json=body).json()
    difference = line_amount("api_request", billed + 7) - line_amount("api_request", billed)
    assert (draft["status"], draft["number"], Decimal(draft["total"])) == ("draft", None, difference)
    (line,) = draft["lines"]
    assert (line["kind"], line["quantity"]) == ("TRUE_UP", canonical(billed + 7))
    final = client.post(f"/api/v1/invoices/{draft['id']}:finalize").json()
    assert final["status"] == "open" and Decimal(final["total"]) == difference
    assert_gapless(all_invoices(client))


def assert_gapless(invoices: list[dict[str, Any]]) -> None:
    numbers = sorted(invoice["number"] for invoice in invoices)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_killed_in_the_middle_of_an_import_nothing_is_lost_or_doubled(tmp_path: Path, log_path: Path) -> None:
    """I1 and I2: kill -9 of the whole tree, start again, import again, and the totals are the same."""
    expected = expected_of(read_log(log_path))
    port = free_port()
    stack = RunningStack.start(tmp_path / "home", http_port=port)
    importing = stack.command("events", "import", str(log_path))
    client = stack.client()
    # Some of it is acknowledged, and some of it is not.
    while usage(client).get("api_request", ("0", 0))[1] < 1_000:
        assert importing.poll() is None, "the import was over before it could be interrupted"
    stack.kill()
    importing.kill()
    importing.communicate()

    stack = RunningStack.start(tmp_path / "home", http_port=port)
    try:
        answer = stack.json("events", "import", str(log_path))
        assert 1_000 <= answer["duplicates"] < expected.requests + expected.transfers
        assert usage(stack.client()) == {
            "api_request": (str(expected.requests), expected.requests),
            "egress_mb": (canonical(expected.total_quantity("egress_mb")), expected.transfers),
        }
        (sealed,) = stack.seal()
        assert sealed["entry_count"] == expected.requests + expected.transfers
    finally:
        assert stack.stop() == 0


def test_a_log_that_has_grown_adds_only_what_is_new(stack: RunningStack, tmp_path: Path) -> None:
    month = datetime(2016, 2, 1, tzinfo=UTC)
    line = '198.51.100.9 - - [03/Feb/2016:10:0{n}:00 +0100] "GET / HTTP/1.1" 200 1500000 "-" "curl/8"\n'
    grown = tmp_path / "growing.log"
    grown.write_text("".join(line.format(n=n) for n in range(3)))
    assert stack.json("events", "import", str(grown))["new"] == 6
    grown.write_text("".join(line.format(n=n) for n in range(5)))
    answer = stack.json("events", "import", str(grown))
    assert (answer["new"], answer["duplicates"]) == (4, 6)
    query = {"start_date": month.isoformat(), "end_date": "2016-03-01T00:00:00Z", "group_by": "tenant"}
    rows = stack.client().get("/api/v1/usage", params=query).json()["usage"]
    assert rows == [{"tenant_id": "198.51.100.9", "total_quantity": "12.5", "event_count": 10}]
