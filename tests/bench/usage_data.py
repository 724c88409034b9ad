"""What the benchmarks send: the event of the published example, with a key, metadata and a timestamp.

Each exists in two forms that hold the same: JSON for the platform, and columns for the bare table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from tests.bench.load import http_request
from tests.bench.platform import Customer
from usameter_proof.ledger_format import event_id_of_key

EVENT_TYPE = "api_request"
BATCH_EVENTS = 1_000
_METADATA = '{"endpoint":"/users","method":"GET"}'
_runs = itertools.count(1)


@dataclass(frozen=True, slots=True)
class SentEvent:
    """One event; its key is its own, its tenant one of few or many."""

    tenant_id: str
    idempotency_key: str
    timestamp: str

    @property
    def json(self) -> str:
        """As a client sends it."""
        return (
            f'{{"event_type":"{EVENT_TYPE}","tenant_id":"{self.tenant_id}","quantity":1,'
            f'"idempotency_key":"{self.idempotency_key}","metadata":{_METADATA},"timestamp":"{self.timestamp}"}}'
        )


def new_events(tenants: int) -> Iterator[SentEvent]:
    """Events without end that nobody has sent before, one after another for each tenant in turn."""
    run = next(_runs)
    timestamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    for number in itertools.count():
        yield SentEvent(f"tenant_{number % tenants:06}", f"request_{run}_{number:09}", timestamp)


def single_requests(customer: Customer, tenants: int = 100) -> Iterator[bytes]:
    """Requests of one event each, without end."""
    for event in new_events(tenants):
        yield http_request("POST", "/api/v1/events", customer.api_key, event.json.encode())


def new_batches(batches: int, tenants: int) -> list[list[SentEvent]]:
    """Batches of `BATCH_EVENTS` events each."""
    events = new_events(tenants)
    return [list(itertools.islice(events, BATCH_EVENTS)) for _ in range(batches)]


def batch_request(customer: Customer, events: Sequence[SentEvent]) -> bytes:
    """One request of many events."""
    body = f'{{"events":[{",".join(event.json for event in events)}]}}'
    return http_request("POST", "/api/v1/events", customer.api_key, body.encode())


def batch_columns(customer: Customer, events: Sequence[SentEvent]) -> list[Sequence[object]]:
    """The columns of ingest.usage_event after org_id, in the order of the primary key.

    Hashes are of the right length and as random as the real ones; what is in them costs an insert nothing.
    """
    now = datetime.now(UTC)
    rows = [(event_id_of_key(customer.org_id, event.idempotency_key), event) for event in events]
    rows.sort(key=lambda row: row[0].int)
    digests = [event_id.bytes * 2 for event_id, _ in rows]
    return [
        [event_id for event_id, _ in rows],
        [event.tenant_id for _, event in rows],
        [EVENT_TYPE] * len(rows),
        [Decimal(1)] * len(rows),
        [datetime.fromisoformat(event.timestamp) for _, event in rows],
        [True] * len(rows),
        [now] * len(rows),
        [1] * len(rows),
        [_METADATA] * len(rows),
        [event.idempotency_key for _, event in rows],
        digests,
        digests,
    ]
