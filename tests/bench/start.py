"""How long a new user waits: from `make run` on a fresh home to the first event that is accepted."""

from __future__ import annotations

import time
from pathlib import Path

from tests.bench.harness import Row, at_most
from tests.support.stack import RunningStack
from usameter_devstack.ports import free_port


async def measure_start(directory: Path, repetitions: int) -> list[Row]:
    """Seconds, with everything installed already."""
    row = Row("`make run` on a fresh home, to the first accepted event", "s", at_most(15), at_most(5))
    for number in range(repetitions):
        started = time.perf_counter()
        stack = RunningStack.start(directory / f"fresh {number}", http_port=free_port())
        with stack.client() as client:
            event = {"event_type": "api_request", "tenant_id": "tenant_abc123", "idempotency_key": "req_1"}
            answer = client.post("/api/v1/events", json=event)
        row.add(time.perf_counter() - started)
        assert answer.status_code == 200, answer.text
        stack.stop()
    return [row]
