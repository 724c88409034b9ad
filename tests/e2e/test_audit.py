"""`usameter audit` and `usameter snapshots` against the running platform: what a person at the terminal sees."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import pytest

from tests.support.stack import RunningStack


def run(stack: RunningStack, *arguments: str, key: str | None = None) -> tuple[int, str]:
    environment = {**os.environ, "USAMETER_HOME": str(stack.home)}
    process = subprocess.run(
        [sys.executable, "-m", "usameter_cli", *arguments],
        env=environment if key is None else {**environment, "USAMETER_API_KEY": key},
        capture_output=True,
        timeout=120,
        check=False,
    )
    return process.returncode, (process.stdout + process.stderr).decode()


@contextmanager
def tampered(stack: RunningStack, statement: str, *, undo: str) -> Iterator[None]:
    """As superuser, behind the services' backs; the stack is everybody's."""

    async def execute(sql: str) -> None:
        connection = await asyncpg.connect(stack.environment["USAMETER_DATABASE_URL"])
        await connection.execute(sql)
        await connection.close()

    asyncio.run(execute(statement))
    try:
        yield
    finally:
        asyncio.run(execute(undo))


@pytest.fixture(scope="module")
def audited(stack: RunningStack) -> str:
    """A tenant with a billed January and a sealed true-up; returns the id of its one event."""
    price = {"model": "per_unit", "currency": "USD", "unit_amount": "0.02"}
    with stack.client() as client:
        event = {"event_type": "audited", "tenant_id": "audited", "quantity": 7, "timestamp": "2026-01-15T10:30:00Z"}
        event_id: str = client.post("/api/v1/events", json=event).json()["event_id"]
        body = {"event_type": "audited", "effective_from": "2026-01-01T00:00:00Z", "price": price}
        assert client.post("/api/v1/prices", json=body).status_code == 200
        stack.seal()
        code, output = run(stack, "invoices", "generate", "--period", "2026-01", "--tenant", "audited", "--finalize")
        assert code == 0, output
        assert client.post(f"/api/v1/events/{event_id}:amend", json={"quantity": 8, "reason": "one more"}).is_success
    return event_id


def test_snapshots_are_sealed_and_listed(stack: RunningStack, audited: str) -> None:
    first: Any = stack.json("snapshots", "seal", "--date", "2020-01-01")
    assert first == {"sealed": [], "job": None}
    (sealed,) = stack.json("snapshots", "seal")["sealed"]
    listed = stack.json("snapshots", "list", "--after", str(sealed["epoch"] - 1))["epochs"]
    assert [(each["epoch"], each["root"]) for each in listed] == [(sealed["epoch"], sealed["root"])]
    assert run(stack, "snapshots", "seal") == (0, "nothing to seal\n")
    code, output = run(stack, "snapshots", "list")
    assert code == 0
    assert sealed["root"] in output
    code, output = run(stack, "snapshots", "seal", "--date", "2026-02-30")
    assert (code, output) == (1, "usameter: --date must be a day like \"2015-05-17\", not '2026-02-30'.\n")


def test_a_platform_in_use_has_no_violation(stack: RunningStack, audited: str) -> None:
    code, output = run(stack, "audit")
    assert code == 0, output
    assert output.endswith("; violations: 0\n")
    found = stack.json("audit")
    assert found["violations"] == []
    assert set(found["checked"]) == {"ingest", "quota", "billing"}
    assert all(found["checked"].values())


def test_a_violation_is_named_in_a_table_and_by_the_exit_code(stack: RunningStack, audited: str) -> None:
    event_id = audited.removeprefix("evt_")
    change = "UPDATE ingest.usage_event SET metadata = '{0}' WHERE event_id = '" + event_id + "'"
    with tampered(stack, change.replace("{0}", '{"a":1}'), undo=change.replace("{0}", "{}")):
        code, output = run(stack, "audit")
        assert code == 1
        (line,) = [line for line in output.splitlines() if line.startswith("I1")]
        assert "an event's request hash is not that of what is stored" in line
        assert f"event_id {audited}" in output
        assert output.endswith("; violations: 1\n")
        code, output = run(stack, "audit", "--json", "--only", "ingest")
        assert code == 1
        assert f'"event_id": "{audited}"' in output
        assert run(stack, "audit", "--only", "quota")[0] == run(stack, "audit", "--only", "billing")[0] == 0
    assert run(stack, "audit")[0] == 0


def test_a_billed_line_that_was_changed_is_named(stack: RunningStack, audited: str) -> None:
    change = "UPDATE billing.invoice_line SET amount = amount {0} 1 WHERE event_type = 'audited'"
    with tampered(stack, change.replace("{0}", "+"), undo=change.replace("{0}", "-")):
        code, output = run(stack, "audit", "--only", "billing")
    assert code == 1
    assert [line.split()[0] for line in output.splitlines() if line[:1] == "I"] == ["I6", "I7", "I7"]


def test_the_key_of_an_audit_needs_no_other_scope(stack: RunningStack, audited: str) -> None:
    with stack.client() as client:
        made = {name: client.post("/api/v1/api-keys", json={"name": name, "scopes": [name]}).json() for name in SCOPES}
    assert run(stack, "audit", key=made["audit:read"]["secret"])[0] == 0
    code, output = run(stack, "audit", key=made["events:read"]["secret"])
    assert code == 1
    assert "audit:read" in output


SCOPES = ("audit:read", "events:read")
