"""A hard limit under racing clients: not a speed, a check."""

from __future__ import annotations

import json
from collections import Counter

from tests.bench.harness import Row, exactly
from tests.bench.load import Answer, UnexpectedAnswer, expect_ok, http_request, open_connections, send_closed
from tests.bench.platform import Platform
from tests.bench.usage_data import EVENT_TYPE, single_requests

_LIMIT = 1_000
_CLIENTS = 64
_ATTEMPTS = 2_000
_TENANT = "tenant_000000"  # the only one of `single_requests(tenants=1)`


async def measure_hard_limit(platform: Platform, repetitions: int) -> list[Row]:
    """How many of 2,000 events are accepted where 1,000 are allowed."""
    row = Row(
        f"accepted under a HARD limit of {_LIMIT:,}, {_CLIENTS} racing clients",
        "events",
        must=exactly(_LIMIT),
        aim=exactly(_LIMIT),
        note=f"{_ATTEMPTS:,} sent; everything not accepted was answered QUOTA_EXCEEDED",
    )
    for _ in range(repetitions):
        row.add(await _race(platform))
    return [row]


async def _race(platform: Platform) -> int:
    customer = await platform.new_customer()
    statuses: Counter[int] = Counter()

    def count(answer: Answer) -> None:
        if answer.status != 200 and json.loads(answer.body)["code"] != "QUOTA_EXCEEDED":
            raise UnexpectedAnswer(f"{answer.status} {answer.body[:500]!r}")
        statuses[answer.status] += 1

    limit = {"limit_value": str(_LIMIT), "enforcement_mode": "HARD", "period": "MONTHLY"}
    path = f"/api/v1/quotas/{_TENANT}/{EVENT_TYPE}"
    async with open_connections(platform.url, _CLIENTS) as connections:
        await send_closed(connections[:1], [http_request("PUT", path, customer.api_key, json.dumps(limit).encode())])
        requests = (request for request, _ in zip(single_requests(customer, tenants=1), range(_ATTEMPTS), strict=False))
        await send_closed(connections, requests, count)
        answer = await connections[0].exchange(
            http_request("GET", f"/api/v1/usage?tenant_id={_TENANT}", customer.api_key)
        )
    expect_ok(answer)
    stored = sum(group["event_count"] for group in json.loads(answer.body)["usage"])
    assert stored == statuses[200], f"{statuses[200]} accepted and {stored} stored"
    return statuses[200]
