"""What corrections give back, on its way to quota."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

from structlog.testing import capture_logs

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import open_services
from tests.support.sql import execute, fetch_rows
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)


async def test_a_row_that_quota_refuses_keeps_no_other_waiting_and_is_named(database: Database) -> None:
    """I4: what was given back reaches the counter, whatever else is in the outbox."""
    # Gives back what was never counted, and is older than what comes.
    refused = uuid4()
    await execute(
        database,
        """
        INSERT INTO ingest.quota_outbox (org_id, event_id, tenant_id, event_type, occurred_at, quantity)
        VALUES ($1, $2, 'acme', 'req', $3, -5)
        """,
        uuid4(),
        refused,
        NOW,
    )
    async with open_services(database, clock=ManualClock(NOW)) as services:
        recorded = await services.events.RecordEvents(
            event_pb2.RecordEventsRequest(event_type="req", tenant_id="acme", timestamp=NOW),
            metadata=services.metadata,
            timeout=10,
        )
        void = event_pb2.VoidEventRequest(event_id=recorded.event_id, reason="sent by mistake")
        with capture_logs() as logs:
            await services.events.VoidEvent(void, metadata=services.metadata, timeout=10)

            async def given_back() -> bool:
                waiting = await fetch_rows(database, "SELECT event_id FROM ingest.quota_outbox")
                counted = await fetch_rows(database, "SELECT quantity FROM quota.usage_day")
                return [row["event_id"] for row in waiting] == [refused] and [row["quantity"] for row in counted] == [0]

            await until(given_back, "the other row is delivered")

            async def named() -> bool:
                return any(entry["event"] == "given_back_refused" for entry in logs)

            await until(named, "the refused row is named")
    entry = next(entry for entry in logs if entry["event"] == "given_back_refused")
    assert (entry["log_level"], entry["event_ids"]) == ("error", [str(refused)])
