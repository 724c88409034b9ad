"""What can be recorded at all, and what an event is filled with."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from usameter.ingest.v1 import event_pb2
from usameter_client import (
    AsyncRecorder,
    GrpcTransport,
    InvalidEvent,
    Options,
    RestTransport,
    Transport,
    Undelivered,
    UsageEvent,
)
from usameter_client.events import EVENT_BYTES_MAX, METADATA_LEVELS_MAX, usage_event

NOW = datetime(2026, 1, 31, 23, 59, 59, 999_999, tzinfo=UTC)
TRANSPORTS: list[Callable[[], Transport]] = [
    lambda: RestTransport("http://127.0.0.1:1", api_key="k"),
    lambda: GrpcTransport("127.0.0.1:1", api_key="k"),
]


def make(**given: Any) -> UsageEvent:
    values: dict[str, Any] = {
        "tenant_id": "t",
        "quantity": 1,
        "idempotency_key": None,
        "timestamp": None,
        "metadata": None,
    }
    return usage_event("api_request", **{**values, **given}, now=NOW)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("name", [None, "job-17"])
def test_an_event_names_the_reservation_that_it_consumes(name: str | None) -> None:
    event = make(reservation_id=name)
    assert msgspec.json.decode(TRANSPORTS[0]().encode(event)).get("reservation_id") == name
    (sent,) = event_pb2.RecordEventsRequest.FromString(TRANSPORTS[1]().encode(event)).events
    assert (sent.reservation_id if sent.HasField("reservation_id") else None) == name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, "1"),
        (0.1, "0.1"),
        (Decimal("0.000001"), "0.000001"),
        (Decimal("99999999999999.999999"), "99999999999999.999999"),
        (Decimal("1.0000000000"), "1"),
        (10**14 - 1, "99999999999999"),
    ],
)
def test_a_quantity_is_carried_exactly(given: Any, expected: str) -> None:
    body = msgspec.json.decode(TRANSPORTS[0]().encode(make(quantity=given)))
    assert body["quantity_decimal"] == expected
    (event,) = event_pb2.RecordEventsRequest.FromString(TRANSPORTS[1]().encode(make(quantity=given))).events
    assert event.quantity_decimal == expected


@pytest.mark.parametrize(
    "given", [0, -1, 10**14, 0.1 + 0.2, Decimal("0.0000001"), float("nan"), float("inf"), Decimal("1e30")]
)
def test_a_quantity_that_is_not_carried_exactly_is_refused(given: Any) -> None:
    with pytest.raises(InvalidEvent):
        make(quantity=given)


def test_an_event_without_key_gets_one_of_its_own_and_the_time_of_recording() -> None:
    first, second = make(), make()
    assert first.idempotency_key != second.idempotency_key
    assert first.timestamp == NOW


def test_an_event_with_a_key_gets_no_time_that_a_repetition_would_contradict() -> None:
    assert make(idempotency_key="job-7").timestamp is None


def test_a_time_is_sent_in_utc_and_one_without_zone_is_refused() -> None:
    there = datetime(2026, 2, 1, 1, 0, tzinfo=timezone(timedelta(hours=2)))
    assert msgspec.json.decode(TRANSPORTS[0]().encode(make(timestamp=there)))["timestamp"] == "2026-01-31T23:00:00Z"
    with pytest.raises(InvalidEvent):
        make(timestamp=datetime(2026, 2, 1))  # noqa: DTZ001 - the fault under test


def test_metadata_is_copied_when_it_is_recorded() -> None:
    metadata: dict[str, Any] = {"tags": ["a"], "size": (1, 2.5, None, True)}
    event = make(metadata=metadata)
    metadata["tags"].append("b")
    assert event.metadata == {"tags": ["a"], "size": [1, 2.5, None, True]}


@pytest.mark.parametrize("metadata", [{"n": 2**53}, {"n": -(2**53)}, nested(METADATA_LEVELS_MAX)])
def test_metadata_at_its_bounds_is_taken_by_both_transports(metadata: Any) -> None:
    for transport in TRANSPORTS:
        assert transport().encode(make(metadata=metadata))


@pytest.mark.parametrize(
    "metadata",
    [
        {"n": 2**53 + 1},
        {"n": float("nan")},
        {"n": Decimal(1)},
        {1: "x"},
        {"a": {2: "x"}},
        {"at": NOW},
        nested(METADATA_LEVELS_MAX + 1),
    ],
)
def test_metadata_that_json_cannot_carry_is_refused(metadata: Any) -> None:
    with pytest.raises(InvalidEvent):
        make(metadata=metadata)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_event_larger_than_any_event_may_be_is_refused(transport: Callable[[], Transport]) -> None:
    assert transport().encode(make(metadata={"text": "x" * 16_000}))
    with pytest.raises(InvalidEvent):
        transport().encode(make(metadata={"text": "x" * EVENT_BYTES_MAX}))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_text_that_is_not_unicode_is_refused(transport: Callable[[], Transport]) -> None:
    with pytest.raises(InvalidEvent):
        transport().encode(make(tenant_id="\ud800"))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"quantity": Decimal("12.500"), "idempotency_key": "job-7", "reservation_id": "job-7"},
        {"timestamp": datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)},
        {"metadata": {}},
        {"metadata": {"zone": "b", "n": [1, -2, 0, 2**53, -(2**53)], "x": (0.1, 1e300, None, {"on": True})}},
    ],
)
def test_an_event_is_read_back_as_it_was_and_encoded_the_same(
    transport: Callable[[], Transport], given: dict[str, Any]
) -> None:
    event = make(**given)
    body = transport().encode(event)
    read = transport().decode(body)
    assert read == event
    # 1 is equal to 1.0, and would be another text in a log. A Struct keeps no order of names.
    assert sorted(repr(read.metadata)) == sorted(repr(event.metadata))
    assert len(transport().encode(read)) == len(body)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_recorder_holds_no_more_memory_than_the_encoded_events(transport: Callable[[], Transport]) -> None:
    """Metadata of many small objects is some ten times as large in Python as it is encoded."""

    def event(number: int) -> UsageEvent:
        return make(idempotency_key=f"k{number}", metadata={f"{number}.{n}": {} for n in range(500)})

    codec = transport()
    encoded_bytes = sum(len(codec.encode(event(number))) for number in range(20))
    recorder = AsyncRecorder(
        transport(), on_rejected=lambda *_: None, options=Options(linger_seconds=600, close_seconds=0)
    )
    with pytest.raises(Undelivered) as raised:
        async with recorder:
            tracemalloc.start()
            for number in range(20):
                await recorder.record_event(event(number))
            held_bytes, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert encoded_bytes <= held_bytes <= 1.2 * encoded_bytes
    assert list(raised.value.events) == [event(number) for number in range(20)]


def test_serialized_events_one_after_the_other_are_one_request() -> None:
    transport = TRANSPORTS[1]()
    joined = b"".join(transport.encode(make(idempotency_key=key)) for key in "abc")
    request = event_pb2.RecordEventsRequest.FromString(joined)
    assert [event.idempotency_key for event in request.events] == ["a", "b", "c"]


def test_a_url_of_another_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="http"):
        RestTransport("127.0.0.1:8080", api_key="k")


@pytest.mark.parametrize("key", ["usa_secret\n", "usa_secret ", "usa_\x00secret", "usa_secret\x7f", "usa_sécret", ""])
@pytest.mark.parametrize("make_transport", [RestTransport, GrpcTransport])
def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(
    make_transport: Callable[..., Transport], key: str
) -> None:
    with pytest.raises(ValueError, match="api_key") as raised:
        make_transport("http://127.0.0.1:1", api_key=key)
    assert "cret" not in str(raised.value)
    assert make_transport("http://127.0.0.1:1", api_key="!~usa_secret")
