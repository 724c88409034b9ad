"""The operation of sealing: on schedule, from several replicas, cut off anywhere, and seen from outside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, time, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import grpc.aio
import pytest
from structlog.testing import capture_logs

from tests.conftest import Database
from tests.support.services import Services, new_organization, open_replica, open_services, reason_of
from tests.support.sql import execute, fetch_rows, fetch_value
from tests.support.wait import until
from usameter.common.v1 import job_pb2
from usameter.ingest.v1 import event_pb2, snapshot_pb2
from usameter_core.clock import SystemClock
from usameter_core.config import ConfigError
from usameter_core.errors import Unavailable
from usameter_core.ids import format_id, new_uuid
from usameter_core.period import latest_time_of_day
from usameter_core.postgres.pool import open_pool
from usameter_ingest.config import IngestSettings
from usameter_ingest.service import sealing
from usameter_ingest.service.sealing import SealingService
from usameter_ingest.store.epochs import EpochStore
from usameter_ingest.worker import DailySeal

MIDNIGHT = time(0, 0)


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=SystemClock()) as running:
        yield running


@pytest.fixture
async def epochs(database: Database) -> AsyncIterator[EpochStore]:
    async with open_pool(database.role_url("ingest"), application_name="test") as pool:
        yield EpochStore(pool)


async def record(services: Services, count: int, *, name: str = "k", api_key: str | None = None) -> None:
    metadata = services.metadata if api_key is None else (("authorization", f"Bearer {api_key}"),)
    request = event_pb2.RecordEventsRequest(
        events=[
            {"event_type": "req", "tenant_id": f"t{i % 3}", "idempotency_key": f"{name}{i}", "quantity_decimal": "1"}
            for i in range(count)
        ]
    )
    await services.events.RecordEvents(request, metadata=metadata, timeout=10)


async def days_ago(database: Database, days: int) -> None:
    """All that was recorded and opened is that much older."""
    await execute(
        database, "UPDATE ingest.epoch SET opened_at = opened_at - $1::interval", timedelta(days=days, hours=1)
    )
    await execute(
        database, "UPDATE ingest.usage_event SET ingested_at = ingested_at - $1::interval", timedelta(days=days)
    )


async def epochs_of(database: Database) -> list[tuple[UUID, int, str]]:
    rows = await fetch_rows(database, "SELECT org_id, epoch, state FROM ingest.epoch ORDER BY org_id, epoch")
    return [(row["org_id"], row["epoch"], row["state"]) for row in rows]


def daily(epochs: EpochStore) -> DailySeal:
    return DailySeal(SealingService(epochs), at=MIDNIGHT, clock=SystemClock())


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-03-10T00:14:59Z", "2026-03-09T00:15:00Z"),
        ("2026-03-10T00:15:00Z", "2026-03-10T00:15:00Z"),
        ("2026-03-10T23:59:59Z", "2026-03-10T00:15:00Z"),
        ("2026-03-01T00:00:00Z", "2026-02-28T00:15:00Z"),
    ],
)
def test_the_latest_time_of_day_is_today_or_yesterday(moment: str, expected: str) -> None:
    found = latest_time_of_day(time(0, 15), datetime.fromisoformat(moment))
    assert found == datetime.fromisoformat(expected)


@pytest.mark.parametrize("text", ["24:00", "0:15", "00:15Z", "midnight", ""])
def test_a_time_of_day_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("USAMETER_INGEST_SEAL_AT", text)
    with pytest.raises(ConfigError, match="USAMETER_INGEST_SEAL_AT"):
        IngestSettings.from_environment()


async def test_what_was_recorded_before_the_time_of_day_is_closed_once(
    services: Services, database: Database, epochs: EpochStore
) -> None:
    await record(services, 3)
    await days_ago(database, 1)
    await daily(epochs).run_once()
    assert [(epoch, state == "OPEN") for _, epoch, state in await epochs_of(database)] == [(1, False), (2, True)]
    # What comes after the time of day waits for the next, whoever looks.
    await record(services, 3, name="later")
    seals = daily(epochs)
    for _ in range(3):
        await seals.run_once()
    assert len(await epochs_of(database)) == 2


async def test_missed_days_are_caught_up_in_one_epoch(
    services: Services, database: Database, epochs: EpochStore
) -> None:
    for name in ("first", "second", "third"):
        await record(services, 2, name=name)
        await days_ago(database, 1)
    await daily(epochs).run_once()
    await SealingService(epochs).seal_closed()
    sealed = await fetch_rows(database, "SELECT epoch, entry_count FROM ingest.epoch WHERE state = 'SEALED'")
    assert sealed == [{"epoch": 1, "entry_count": 6}]


async def test_several_replicas_close_each_epoch_once(
    services: Services, database: Database, epochs: EpochStore
) -> None:
    organizations = {services.org_id}
    await record(services, 1)
    for number in range(5):
        org_id, api_key = await new_organization(database, f"other{number}")
        await record(services, 1, api_key=api_key)
        organizations.add(org_id)
    await days_ago(database, 1)
    replicas = [daily(epochs) for _ in range(4)]
    await asyncio.gather(*(replica.run_once() for replica in replicas))
    # Those behind the first find the new epochs empty.
    await asyncio.gather(*(replica.run_once() for replica in replicas))
    await asyncio.gather(*(SealingService(epochs).seal_closed() for _ in replicas))
    expected = [each for org_id in sorted(organizations) for each in ((org_id, 1, "SEALED"), (org_id, 2, "OPEN"))]
    assert await epochs_of(database) == expected


async def test_the_service_seals_by_itself_where_it_is_told_when(services: Services, database: Database) -> None:
    await record(services, 3)
    await days_ago(database, 1)
    async with open_replica(database, services, clock=SystemClock(), seal_at="00:00"):

        async def sealed() -> bool:
            return await fetch_value(database, "SELECT count(*) FROM ingest.epoch WHERE state = 'SEALED'") == 1

        await until(sealed, "the epoch of yesterday is sealed")


async def test_a_seal_cut_off_anywhere_begins_again_and_gives_the_same_root(
    database: Database, epochs: EpochStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database kills the sealer while it hashes, after it wrote snapshots, its root, and all but the commit."""
    monkeypatch.setattr(sealing, "PROGRESS_SECONDS", 0.0)
    async with open_services(database, clock=SystemClock()) as services:
        for number in range(10):
            await record(services, 300, name=f"k{number}.")
    await epochs.close(services.org_id, ingested_before=datetime.now(UTC) + timedelta(days=1), job_id=new_uuid())
    await SealingService(epochs).seal_closed()
    sealed = await fetch_rows(database, SEALED)
    assert len(sealed) == 3
    await execute(database, "DELETE FROM ingest.snapshot")
    await execute(database, UNSEAL)
    await execute(database, KILL_SEALER)
    for moment in (
        "INSERT OR UPDATE ON ingest.seal_progress FOR EACH ROW WHEN (NEW.entry_count = 256)",
        "INSERT OR UPDATE ON ingest.seal_progress FOR EACH ROW WHEN (NEW.entry_count = 3000)",
        "INSERT ON ingest.snapshot FOR EACH STATEMENT",
        "UPDATE ON ingest.epoch FOR EACH STATEMENT",
        "DELETE ON ingest.seal_progress FOR EACH STATEMENT",
    ):
        await execute(database, f"CREATE TRIGGER kills AFTER {moment} EXECUTE FUNCTION kill_sealer()")
        async with open_pool(database.role_url("ingest"), application_name="sealer") as pool:
            with pytest.raises(Unavailable):
                await SealingService(EpochStore(pool)).seal_closed()
        await execute(database, f"DROP TRIGGER kills ON {moment.split(' ON ')[1].split()[0]}")
        assert await fetch_value(database, "SELECT count(*) FROM ingest.snapshot") == 0
        assert await fetch_value(database, "SELECT state FROM ingest.epoch WHERE epoch = 1") == "CLOSED"
    await SealingService(epochs).seal_closed()
    assert await fetch_rows(database, SEALED) == sealed
    assert await fetch_value(database, "SELECT count(*) FROM ingest.seal_progress") == 0


UNSEAL = """
    UPDATE ingest.epoch
    SET state = 'CLOSED', sealed_at = NULL, entry_count = NULL, snapshot_count = NULL, snapshots_root = NULL,
        previous_root = NULL, root = NULL
    WHERE epoch = 1
    """
KILL_SEALER = """
    CREATE FUNCTION kill_sealer() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
    BEGIN
        PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sealer'
        ORDER BY pid = pg_backend_pid();  -- last, since that ends this
        RETURN NULL;
    END
    $$
    """
SEALED = """
    SELECT epoch, snapshot_id, epoch.entry_count, epoch.root, snapshot.root AS snapshot_root
    FROM ingest.epoch JOIN ingest.snapshot USING (org_id, epoch) ORDER BY epoch, snapshot_id
    """


async def test_a_job_and_the_log_say_how_many_entries_are_hashed(
    services: Services, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "PROGRESS_SECONDS", 0.0)
    await record(services, 30)
    blocker = await asyncpg.connect(database.admin_url)
    blocking = blocker.transaction()
    await blocking.start()
    # Sealing waits when it writes its snapshots; all entries are hashed by then.
    await blocker.execute("LOCK TABLE ingest.snapshot IN SHARE MODE")
    with capture_logs() as logs:
        request = snapshot_pb2.SealEpochsRequest()
        answer = await services.snapshots.SealEpochs(request, metadata=services.cron_metadata, timeout=2)
    assert not answer.sealed
    assert (answer.job.state, answer.job.done, answer.job.total) == (job_pb2.running, 30, 30)
    told = [(each["epoch"], each["entries"]) for each in logs if each["event"] == "epoch_sealing"]
    assert told[:3] == [(1, 10), (1, 20), (1, 30)]
    await blocking.rollback()
    await blocker.close()

    async def job() -> Any:
        asked = snapshot_pb2.GetSealJobRequest(job_id=answer.job.id)
        return await services.snapshots.GetSealJob(asked, metadata=services.cron_metadata, timeout=5)

    async def succeeded() -> bool:
        return bool((await job()).state == job_pb2.succeeded)

    await until(succeeded, "the service's own loop has sealed the epoch")
    found = await job()
    assert (found.done, found.total) == (30, 30)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        unknown = snapshot_pb2.GetSealJobRequest(job_id=format_id("job", new_uuid()))
        await services.snapshots.GetSealJob(unknown, metadata=services.cron_metadata, timeout=5)
    assert reason_of(caught.value) == "NOT_FOUND"
