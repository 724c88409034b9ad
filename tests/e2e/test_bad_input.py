"""Bad input at every door gets the documented error, and nothing is stored."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.stack import RunningStack

EVENT = {"event_type": "bad_input", "tenant_id": "acme"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client(stack: RunningStack) -> Iterator[httpx.Client]:
    """Checks that whatever a test sent, no event of it was stored."""
    with stack.client() as opened:
        yield opened
        listed = opened.get("/api/v1/events", params={"event_type": "bad_input"}).json()
        assert listed == {"events": []}


def check_error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    assert set(body) == {"error", "code", "details"} and body["code"] == code and body["error"]
    details: dict[str, Any] = body["details"]
    return details


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({**EVENT, "quantity": "1"}, "quantity"),
        ({**EVENT, "quantity": 0.0000001}, "quantity"),
        ({**EVENT, "quantity": 1e30}, "quantity"),
        ({**EVENT, "quantity": -1}, "quantity"),
        ({**EVENT, "quantity": True}, "quantity"),
        ({**EVENT, "quantitty": 5}, "quantitty"),
        ({**EVENT, "quantity_decimal": 1.5}, "quantity_decimal"),
        ({**EVENT, "tenant_id": 7}, "tenant_id"),
        ({**EVENT, "tenant_id": "a\x00"}, "tenant_id"),
        ({**EVENT, "metadata": [1]}, "metadata"),
        ({**EVENT, "metadata": {"id": 2**53 + 1}}, "metadata.id"),
        ({**EVENT, "timestamp": "yesterday"}, "timestamp"),
        ({**EVENT, "timestamp": "2026-01-15T10:30:00"}, "timestamp"),
        ({"event_type": "bad_input"}, "tenant_id"),
        ({"events": [EVENT, {**EVENT, "quantity": 0}]}, "events[1].quantity"),
        ({"events": [EVENT, {**EVENT, "colour": 1}]}, "events[1].colour"),
        ({"events": {"a": 1}}, "events"),
        ({"events": [EVENT] * 1_001}, "events"),
    ],
)
def test_a_wrong_event_is_named_by_its_field(client: httpx.Client, body: dict[str, Any], field: str) -> None:
    details = check_error(client.post("/api/v1/events", json=body), 400, "INVALID_ARGUMENT")
    assert field in [violation["field"] for violation in details["violations"]]


@pytest.mark.parametrize(
    "text", ["", "{", '{"event_type":}', "[]", "1", '{"quantity": NaN}', '{"quantity": 01}', "\x00", '{"a":1} {']
)
def test_what_is_not_a_json_object_is_refused(client: httpx.Client, text: str) -> None:
    answer = client.post("/api/v1/events", content=text, headers=JSON)
    assert answer.status_code == 400 and answer.json()["code"] in {"MALFORMED_JSON", "INVALID_ARGUMENT"}


def test_a_body_is_at_most_four_mebibytes_of_json(client: httpx.Client) -> None:
    huge = json.dumps({**EVENT, "metadata": {"x": "y" * 5_000_000}})
    details = check_error(client.post("/api/v1/events", content=huge, headers=JSON), 413, "PAYLOAD_TOO_LARGE")
    assert details["limit_bytes"] == 4 * 1024 * 1024

    def chunks() -> Iterator[bytes]:
        for _ in range(80):
            yield b" " * 65_536

    check_error(client.post("/api/v1/events", content=chunks(), headers=JSON), 413, "PAYLOAD_TOO_LARGE")
    answer = client.post("/api/v1/events", content=json.dumps(EVENT), headers={"Content-Type": "text/plain"})
    check_error(answer, 415, "UNSUPPORTED_MEDIA_TYPE")


def test_routes_that_are_not_there(client: httpx.Client) -> None:
    check_error(client.get("/api/v1/nothing"), 404, "NOT_FOUND")
    check_error(client.get("/api/v2/events"), 404, "NOT_FOUND")
    answer = client.delete("/api/v1/events")
    check_error(answer, 405, "METHOD_NOT_ALLOWED")
    assert set(answer.headers["allow"].replace(" ", "").split(",")) >= {"GET", "POST"}
    check_error(client.get("/api/v1/events", params={"tenant": "acme"}), 400, "INVALID_ARGUMENT")
    check_error(client.get("/api/v1/usage", params={"group_by": "colour"}), 400, "INVALID_ARGUMENT")
    check_error(client.get("/api/v1/events/evt_" + "0" * 32), 404, "NOT_FOUND")
    check_error(client.get("/api/v1/events/nonsense"), 400, "INVALID_ARGUMENT")


def test_nobody_gets_in_without_a_key_that_may(client: httpx.Client, stack: RunningStack) -> None:
    bad = [
        "",
        "Bearer",
        "Bearer usa_wrong",
        "Basic dXNlcjpwYXNz",
        f"Bearer {stack.environment['USAMETER_CRON_SECRET']}",
    ]
    for authorization in bad:
        answer = httpx.post(f"{stack.url}/api/v1/events", json=EVENT, headers={"Authorization": authorization})
        check_error(answer, 401, "UNAUTHENTICATED")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    made = client.post("/api/v1/api-keys", json={"name": "reader", "scopes": ["events:read"]}).json()
    reader = {"Authorization": f"Bearer {made['secret']}"}
    details = check_error(
        httpx.post(f"{stack.url}/api/v1/events", json=EVENT, headers=reader), 403, "PERMISSION_DENIED"
    )
    assert details == {"missing_scope": "events:write"}
    assert httpx.get(f"{stack.url}/api/v1/events", headers=reader).status_code == 200
    key = stack.environment["USAMETER_API_KEY"]
    cron = httpx.post(f"{stack.url}/api/cron/snapshots", headers={"Authorization": f"Bearer {key}"})
    check_error(cron, 401, "UNAUTHENTICATED")


def test_quota_errors_are_the_published_ones_to_the_letter(client: httpx.Client) -> None:
    limit = {"limit_value": "0", "enforcement_mode": "HARD", "period": "MONTHLY"}
    assert client.put("/api/v1/quotas/acme/bad_input", json=limit).status_code == 200
    answer = client.post("/api/v1/events", json=EVENT)
    assert answer.status_code == 403
    reset_at = answer.json()["details"]["reset_at"]
    assert answer.json() == {
        "error": "Quota exceeded",
        "code": "QUOTA_EXCEEDED",
        "details": {"limit": 0, "current": 0, "reset_at": reset_at},
    }
    batch = client.post("/api/v1/events", json={"events": [EVENT, EVENT]}).json()
    assert batch["details"]["violations"] == [
        {"tenant_id": "acme", "event_type": "bad_input", "limit": 0, "current": 0, "requested": 2, "reset_at": reset_at}
    ]
    assert client.delete("/api/v1/quotas/acme/bad_input").status_code == 200


@pytest.mark.parametrize(
    ("price", "field"),
    [
        ({"model": "graduated", "currency": "USD", "tiers": [{"up_to": "5", "unit_amount": "1"}]}, "price.tiers"),
        ({"model": "per_unit", "currency": "USD", "unit_amount": "-1"}, "price.unit_amount"),
        ({"model": "per_unit", "currency": "usd", "unit_amount": "1"}, "price.currency"),
        ({"model": "guess", "currency": "USD"}, "price.model"),
        ({"model": "per_unit", "currency": "USD", "unit_amount": 1}, "price.unit_amount"),
    ],
)
def test_a_wrong_price_is_named_by_its_field(client: httpx.Client, price: dict[str, Any], field: str) -> None:
    answer = client.post("/api/v1/prices:preview", json={"price": price, "quantity": "5"})
    details = check_error(answer, 400, "INVALID_ARGUMENT")
    assert any(violation["field"].startswith(field) for violation in details["violations"])


def test_wrong_bounds_of_an_invoice_name_the_right_ones(client: httpx.Client) -> None:
    body = {"tenant_id": "acme", "period_start": "2015-05-02T00:00:00Z", "period_end": "2015-06-01T00:00:00Z"}
    details = check_error(client.post("/api/v1/invoices", json=body), 400, "INVALID_ARGUMENT")
    assert "2015-05-01T00:00:00Z" in str(details["violations"])


def run_up(home: Path, port: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "usameter_cli", "up"],
        env={**os.environ, "USAMETER_HOME": str(home), "USAMETER_HTTP_PORT": port},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_taken_port_is_said_and_what_to_do_about_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, output = run_up(tmp_path / "home", port)
    assert code != 0 and port in output and "USAMETER_HTTP_PORT" in output and "Traceback" not in output


def test_a_home_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    code, output = run_up(file / "home", "0")
    assert code != 0 and "USAMETER_HOME" in output and "Traceback" not in output


def test_a_second_stack_of_the_same_home_is_refused(stack: RunningStack) -> None:
    code, output = run_up(stack.home, "0")
    assert code != 0 and "already" in output.lower() and "Traceback" not in output
