"""`usameter quotas reconcile` against the running platform: what a person at the terminal sees."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg

from tests.support.stack import RunningStack


def run(stack: RunningStack, *arguments: str) -> tuple[int, str]:
    process = stack.command("quotas", "reconcile", *arguments)
    output, errors = process.communicate(timeout=120)
    assert errors == b""
    return process.returncode, output.decode()


def test_a_counter_that_is_wrong_is_shown_and_fixed(stack: RunningStack) -> None:
    event = {"tenant_id": "reconciled", "event_type": "req", "quantity": 1234.5, "timestamp": "2026-01-15T10:30:00Z"}
    with stack.client() as client:
        assert client.post("/api/v1/events", json=event).status_code == 200
    assert run(stack)[0] == 0

    async def tamper() -> None:
        connection = await asyncpg.connect(stack.environment["USAMETER_DATABASE_URL"])
        await connection.execute("UPDATE quota.usage_hour SET quantity = 234.5 WHERE tenant_id = 'reconciled'")
        await connection.close()

    asyncio.run(tamper())
    code, output = run(stack)
    assert code == 1
    assert [line.split() for line in output.splitlines() if "reconciled" in line] == [
        ["reconciled", "req", "hour", "2026-01-15T10:00:00Z", "234.5", "1,234.5", "0", "1,234.5", "no"]
    ]
    code, output = run(stack, "--fix")
    assert code == 0
    assert "wrong: 1; reservations stuck: 0" in output
    found: Any = stack.json("quotas", "reconcile")
    assert (found["differences"], found["stuck_reservations"]) == ([], [])
    assert found["compared"] >= 2
