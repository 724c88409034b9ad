"""Partial batches, streams, and calls that carry many callers' requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, new_organization, open_services, reason_of
from tests.support.sql import fetch_value
from tests.support.wait import until
from usameter.common.v1 import error_pb2
from usameter.identity.v1 import api_key_pb2, api_key_pb2_grpc
from usameter.ingest.v1 import event_pb2
from usameter.quota.v1 import quota_pb2, reservation_pb2, reservation_pb2_grpc
from usameter_core.grpc import auth
from usameter_core.grpc.channels import open_channel
from usameter_ingest.clients import QuotaClient
from usameter_ingest.service.grouping import GroupCommitter

STORED = "SELECT count(*) FROM ingest.usage_event"


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock()) as running:
        yield running


def event(key: str, **fields: Any) -> dict[str, Any]:
    return {"event_type": "req", "tenant_id": "acme", "idempotency_key": key, **fields}


def reason_in(status: bytes) -> str:
    info = ErrorInfo()
    assert Status.FromString(status).details[0].Unpack(info)
    return info.reason


def quota_details_in(status: bytes) -> error_pb2.QuotaExceededDetails:
    assert reason_in(status) == "QUOTA_EXCEEDED"
    details = error_pb2.QuotaExceededDetails()
    assert Status.FromString(status).details[1].Unpack(details)
    return details


async def test_what_the_database_refuses_of_a_group_fails_alone(services: Services, database: Database) -> None:
    """No request is known that passes all checks and is refused then; one that is must not take others with it."""
    await poison(database)
    items = [
        event_pb2.RecordManyItem(
            authorization=f"Bearer {services.api_key}",
            request=event_pb2.RecordEventsRequest(**event(tenant, tenant_id=tenant)),
        )
        for tenant in ("acme", "poison", "globex", "initech", "umbrella")
    ]
    answer = await services.events.RecordMany(event_pb2.RecordManyRequest(items=items), timeout=10)
    assert [outcome.WhichOneof("outcome") for outcome in answer.outcomes] == [
        "response",
        "status",
        "response",
        "response",
        "response",
    ]
    assert reason_in(answer.outcomes[1].status) == "INTERNAL"
    assert await fetch_value(database, STORED) == 4


@pytest.mark.parametrize("as_json", [True, False])
async def test_what_the_database_refuses_of_a_partial_batch_is_the_fault_of_that_event(
    services: Services, database: Database, as_json: bool
) -> None:
    """The others are stored, so an error in place of the whole answer would say the wrong thing of them."""
    await poison(database)
    batch = [event(tenant, tenant_id=tenant) for tenant in ("acme", "poison", "globex")]
    batch.append(event("bad", quantity=-1.0) if not as_json else event("acme", tenant_id="other"))
    if as_json:
        content: dict[str, Any] = {"json": json.dumps({"events": batch, "partial": True}).encode()}
    else:
        content = {"request": event_pb2.RecordEventsRequest(events=batch, partial=True)}
    item = event_pb2.RecordManyItem(authorization=f"Bearer {services.api_key}", request_id="r-7", **content)
    many = await services.events.RecordMany(event_pb2.RecordManyRequest(items=[item]), timeout=10)
    answer = many.outcomes[0].response
    last = "IDEMPOTENCY_CONFLICT" if as_json else "INVALID_ARGUMENT"
    assert [result.error.code for result in answer.results] == ["", "INTERNAL", "", last]
    assert answer.results[1].error.error == "Internal error"
    assert dict(answer.results[1].error.details) == {"request_id": "r-7"}
    assert (answer.count, answer.new_events, answer.duplicate_events) == (4, 2, 0)
    assert await fetch_value(database, STORED) == 2


async def test_of_a_partial_batch_what_can_be_recorded_is(services: Services, database: Database) -> None:
    await services.events.RecordEvents(event_pb2.RecordEventsRequest(**event("taken")), metadata=services.metadata)
    await limit_small(services, "2")
    batch = [
        event("a"),
        event("bad", quantity=-1.0),
        event("taken", quantity=2.0),
        event("s1", tenant_id="small"),
        event("s2", tenant_id="small"),
        event("s3", tenant_id="small"),
        event("a"),
        event("taken"),
    ]
    request = event_pb2.RecordEventsRequest(events=batch, partial=True)
    answer = await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)
    assert [result.error.code for result in answer.results] == [
        "",
        "INVALID_ARGUMENT",
        "IDEMPOTENCY_CONFLICT",
        "",
        "",
        "QUOTA_EXCEEDED",
        "",
        "",
    ]
    assert [result.HasField("event_id") for result in answer.results] == [
        not result.HasField("error") for result in answer.results
    ]
    assert [result.deduplicated for result in answer.results] == [False] * 6 + [True] * 2
    assert (answer.count, answer.new_events, answer.duplicate_events) == (8, 3, 2)
    assert answer.results[5].error.details["limit"] == 2
    # By their places, as in a batch that is recorded whole.
    assert answer.results[1].error.details["violations"][0]["field"] == "events[1].quantity"
    assert answer.results[2].error.details["field"] == "events[2]"
    assert answer.results[2].error.details["idempotency_key"] == "taken"
    assert answer.results[2].error.error.startswith("events[2]: idempotency key already used by evt_")
    assert await fetch_value(database, STORED) == 4


async def test_a_stream_answers_each_message_after_its_commit(services: Services, database: Database) -> None:
    async def messages() -> AsyncIterator[event_pb2.StreamEventsRequest]:
        for number in range(50):
            batch = event_pb2.RecordEventsRequest(events=[event(f"{number}.{i}") for i in range(10)])
            yield event_pb2.StreamEventsRequest(sequence=number, request=batch)
        yield event_pb2.StreamEventsRequest(sequence=50, request=event_pb2.RecordEventsRequest(tenant_id="x"))
        # Sent again, as after a broken stream.
        yield event_pb2.StreamEventsRequest(sequence=51, request=event_pb2.RecordEventsRequest(events=[event("0.0")]))

    answers = {}
    async for answer in services.events.StreamEvents(messages(), metadata=services.metadata, timeout=20):
        answers[answer.sequence] = answer.outcome
        if answer.sequence < 50:
            assert await fetch_value(database, STORED) >= 10
    assert sorted(answers) == list(range(52))
    assert sum(answers[number].response.new_events for number in range(50)) == 500
    assert reason_in(answers[50].status) == "INVALID_ARGUMENT"
    assert answers[51].response.duplicate_events == 1
    assert await fetch_value(database, STORED) == 500


async def test_a_stream_takes_no_more_messages_than_it_has_under_way(
    services: Services, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = counted(monkeypatch, GroupCommitter, "submit")
    stream = services.events.StreamEvents(metadata=services.metadata, timeout=20)
    async with locked_ledger(database):
        writing = asyncio.create_task(write_all(stream, 200))
        await until_now(lambda: len(submitted) >= 16, "as many are under way as may be")
        # Whatever else the stream brings is there by the time that others have been answered, one after another.
        for _ in range(50):
            with pytest.raises(grpc.aio.AioRpcError):
                await services.events.RecordEvents(event_pb2.RecordEventsRequest(), metadata=services.metadata)
        assert len(submitted) == 16
    received = [each.sequence async for each in stream]
    await writing
    assert sorted(received) == list(range(200))
    assert await fetch_value(database, STORED) == 200


async def write_all(stream: Any, messages: int) -> None:
    for sequence in range(messages):
        await stream.write(stream_message(sequence))
    await stream.done_writing()


async def test_a_key_revoked_while_its_stream_is_open_records_no_more(
    services: Services, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of calls, within the time for which principals are remembered: here none."""
    monkeypatch.setattr(auth, "PRINCIPAL_CACHE_SECONDS", 0.0)
    async with open_channel(services.identity) as channel:
        keys = api_key_pb2_grpc.ApiKeyServiceStub(channel)
        made = await keys.CreateApiKey(
            api_key_pb2.CreateApiKeyRequest(name="stream", scopes=["events:write"]), metadata=services.metadata
        )
        stream = services.events.StreamEvents(metadata=(("authorization", f"Bearer {made.secret}"),), timeout=20)
        await stream.write(stream_message(1))
        assert (await stream.read()).outcome.response.success
        await keys.RevokeApiKey(api_key_pb2.RevokeApiKeyRequest(api_key_id=made.api_key.id), metadata=services.metadata)
    # Each message has its answer, so that the client knows which were not recorded.
    for sequence in (2, 3):
        await stream.write(stream_message(sequence))
        answer = await stream.read()
        assert (answer.sequence, reason_in(answer.outcome.status)) == (sequence, "UNAUTHENTICATED")
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    assert await fetch_value(database, STORED) == 1


def stream_message(sequence: int) -> event_pb2.StreamEventsRequest:
    request = event_pb2.RecordEventsRequest(events=[event(f"{sequence}")])
    return event_pb2.StreamEventsRequest(sequence=sequence, request=request)


async def test_a_stream_needs_a_key(services: Services) -> None:
    async def messages() -> AsyncIterator[event_pb2.StreamEventsRequest]:
        # Nothing: a write that meets the refusal half-way would hide its reason.
        await asyncio.sleep(1)
        yield event_pb2.StreamEventsRequest()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(services.events.StreamEvents(messages(), timeout=10)))
    assert reason_of(caught.value) == "UNAUTHENTICATED"


async def test_each_item_of_a_call_is_recorded_for_its_own_caller(services: Services, database: Database) -> None:
    _, other_key = await new_organization(database, "other")
    items = [
        {"authorization": f"Bearer {services.api_key}", "request": event("same")},
        {"authorization": f"Bearer {other_key}", "request": event("same")},
        {"authorization": "Bearer usa_nobody", "request": event("same")},
        {"authorization": f"Bearer {services.api_key}", "request": event("same")},
        {"authorization": f"Bearer {services.api_key}", "request": event("same", quantity=5.0)},
        {"authorization": f"Bearer {services.api_key}", "request": {"tenant_id": "x"}},
    ]
    answer = await services.events.RecordMany(event_pb2.RecordManyRequest(items=items), timeout=10)
    first, other, nobody, again, conflict, invalid = answer.outcomes
    assert first.response.event_id != other.response.event_id
    assert not first.response.deduplicated and not other.response.deduplicated
    assert again.response.deduplicated and again.response.event_id == first.response.event_id
    assert [reason_in(each.status) for each in (nobody, conflict, invalid)] == [
        "UNAUTHENTICATED",
        "IDEMPOTENCY_CONFLICT",
        "INVALID_ARGUMENT",
    ]
    assert await fetch_value(database, STORED) == 2


async def test_many_events_of_one_key_are_one_commit_and_a_look_up(services: Services, database: Database) -> None:
    """Not a commit for each: sixteen such batches once held the service up for ten seconds."""
    same = [event("none") for _ in range(1_000)]
    requests = [event_pb2.RecordEventsRequest(events=same, partial=True) for _ in range(16)]
    answers = await asyncio.gather(
        *(services.events.RecordEvents(each, metadata=services.metadata, timeout=10) for each in requests)
    )
    assert sum(answer.new_events for answer in answers) == 1
    assert sum(answer.duplicate_events for answer in answers) == 15_999
    assert await fetch_value(database, STORED) == 1


async def test_many_events_of_one_key_over_quota_are_refused_by_one_question(
    services: Services, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by one for each: a hundred were refused so, and the others told that ingest is unavailable."""
    await limit_small(services, "0")
    asked = counted(monkeypatch, QuotaClient, "reserve")
    same = event("none", tenant_id="small")
    answer = await services.events.RecordEvents(
        event_pb2.RecordEventsRequest(events=[same] * 1_000, partial=True), metadata=services.metadata, timeout=10
    )
    assert {result.error.code for result in answer.results} == {"QUOTA_EXCEEDED"}
    assert len(answer.results) == 1_000 and len(asked) == 1
    # Each request in its own form: a batch tells all limits, a single event one.
    many = await record_many(services, [{"events": [same]} if number % 2 else same for number in range(200)])
    details = [quota_details_in(outcome.status) for outcome in many]
    assert [len(each.violations) for each in details] == [0, 1] * 100
    assert len(asked) == 2
    assert await fetch_value(database, STORED) == 0


async def test_requests_that_share_an_event_with_a_refused_one_are_decided_by_what_they_want(
    services: Services, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await limit_small(services, "5")
    stub: Any = reservation_pb2_grpc.ReservationServiceStub(services.quota)
    held = reservation_pb2.ReserveQuotaRequest(tenant_id="small", event_type="req", quantity="2", reservation_id="held")
    await stub.ReserveQuota(held, metadata=services.metadata)
    asked = counted(monkeypatch, QuotaClient, "reserve")

    def small(key: str, quantity: float, **fields: Any) -> dict[str, Any]:
        return event(key, tenant_id="small", quantity=quantity, **fields)

    answers = await record_many(
        services,
        [
            small("less", 4.0),
            small("less", 4.0, metadata={"other": True}),  # wants the same
            small("less", 1.0),
            small("less", 4.0),
            {"events": [small("less", 4.0), small("more", 1.0)]},
            small("earlier", 4.0),
            small("earlier", 4.0, timestamp={"seconds": 1_700_000_000}),
            small("held", 4.0),
            small("held", 4.0, reservation_id="held"),
        ],
    )
    assert [reason_in(each.status) if each.status else "" for each in answers] == [
        "QUOTA_EXCEEDED",
        "QUOTA_EXCEEDED",
        "",
        "QUOTA_EXCEEDED",
        "IDEMPOTENCY_CONFLICT",
        "QUOTA_EXCEEDED",
        "",
        "QUOTA_EXCEEDED",
        "",
    ]
    assert len(asked) == 2
    assert await fetch_value(database, STORED) == 3


async def test_what_a_cancelled_call_has_not_begun_is_not_recorded(
    services: Services, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = counted(monkeypatch, GroupCommitter, "submit")
    async with locked_ledger(database) as ledger:
        first = record_many_call(services, [event("first")])
        await ledger.is_awaited()
        others = record_many_call(services, [event(f"other.{number}") for number in range(20)])
        await until_now(lambda: len(submitted) == 21, "all are submitted")
        others.cancel()
        await until_now(lambda: all(answer.cancelled() for answer in submitted[1:]), "the call is cancelled")
    await first
    # Behind whatever would still be recorded.
    await record_many_call(services, [event("last")])
    assert await fetch_value(database, STORED) == 2


async def test_what_is_cancelled_while_it_is_looked_up_is_not_recorded(
    services: Services, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = counted(monkeypatch, GroupCommitter, "submit")
    async with locked_ledger(database) as ledger:
        call = record_many_call(services, [event(f"{number}") for number in range(20)])
        await ledger.is_awaited()
        call.cancel()
        await until_now(
            lambda: len(submitted) == 20 and all(answer.cancelled() for answer in submitted), "it is cancelled"
        )
    await record_many_call(services, [event("last")])
    assert await fetch_value(database, STORED) == 1


def record_many_call(services: Services, requests: Sequence[Mapping[str, Any]]) -> Any:
    items = [
        event_pb2.RecordManyItem(
            authorization=f"Bearer {services.api_key}", request=event_pb2.RecordEventsRequest(**request)
        )
        for request in requests
    ]
    return services.events.RecordMany(event_pb2.RecordManyRequest(items=items), timeout=10)


async def record_many(services: Services, requests: Sequence[Mapping[str, Any]]) -> Sequence[event_pb2.RecordOutcome]:
    """The outcomes of requests that come in one call, and so in one group."""
    answer: event_pb2.RecordManyResponse = await record_many_call(services, requests)
    return answer.outcomes


async def limit_small(services: Services, limit_value: str) -> None:
    """Limit one tenant's day."""
    limit = quota_pb2.SetQuotaRequest(
        tenant_id="small",
        event_type="req",
        limit_value=limit_value,
        enforcement_mode=quota_pb2.HARD,
        period=quota_pb2.DAILY,
    )
    await services.quotas.SetQuota(limit, metadata=services.metadata)


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> list[Any]:
    """What each call of a method of the services returns, as it is called."""
    returned: list[Any] = []
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        returned.append(original(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(owner, method, call)
    return returned


async def until_now(condition: Callable[[], bool], what: str) -> None:
    async def holds() -> bool:
        return condition()

    await until(holds, what)


class LockedLedger:
    """The table of events, locked against all who would read or write it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def is_awaited(self) -> None:
        """Return once somebody waits for it."""

        async def waits() -> bool:
            return bool(await self._connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        await until(waits, "somebody waits for a lock")


@asynccontextmanager
async def locked_ledger(database: Database) -> AsyncIterator[LockedLedger]:
    connection = await asyncpg.connect(database.admin_url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE ingest.usage_event IN ACCESS EXCLUSIVE MODE")
            yield LockedLedger(connection)
    finally:
        await connection.close()


async def poison(database: Database) -> None:
    """Have the database refuse the events of one tenant."""
    connection = await asyncpg.connect(database.admin_url)
    await connection.execute(
        """
        CREATE FUNCTION ingest.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'poison'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON ingest.usage_event FOR EACH ROW
        WHEN (NEW.tenant_id = 'poison') EXECUTE FUNCTION ingest.refuse();
        """
    )
    await connection.close()
