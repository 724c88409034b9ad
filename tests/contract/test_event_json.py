"""Requests to record that are read as JSON, without a message, mean what they mean when they are transcoded.

The edge and ingest are put side by side: whatever JSON ingest reads itself, the edge would have turned into a
message, of which ingest would have made the same events; and the answer looks the same.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from usameter.ingest.v1 import event_pb2
from usameter_core.ids import OrgId, new_uuid
from usameter_gateway.binding import Binding
from usameter_gateway.descriptors import load_methods
from usameter_gateway.errors import ApiError
from usameter_gateway.recording import RECORD_EVENTS
from usameter_gateway.request import Converters
from usameter_gateway.response import Encoders, json_bytes
from usameter_ingest.domain.event import UsageEvent
from usameter_ingest.service.recording import EventResult, Recorded
from usameter_ingest.servicer.event_input import events_from_proto
from usameter_ingest.servicer.event_json import PlainRequest, answer_to_json, events_from_json
from usameter_ingest.servicer.event_messages import batch_to_proto, single_to_proto

ORG = OrgId(UUID(int=1))
NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)

(METHOD,) = (each for each in load_methods() if each.path == RECORD_EVENTS)
BINDING = Binding(METHOD, METHOD.rules[0], Converters())
ENCODE = Encoders().of(METHOD.response)

PUBLISHED = {
    "event_type": "api_request",
    "tenant_id": "tenant_abc123",
    "quantity": 1,
    "idempotency_key": "req_unique_id",
    "metadata": {"endpoint": "/users", "method": "GET"},
    "timestamp": "2026-01-15T10:30:00Z",
}


def quoted(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    """As JSON, with and without escapes for what is not ASCII."""
    return st.builds(lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only), strategy, st.booleans())


texts = quoted(
    st.one_of(
        *[st.text("aé/😀", min_size=1, max_size=5)] * 6,
        st.text(max_size=5),
        st.sampled_from(["a", "api_request", "é", "", "a" * 101, "k" * 256]),
    )
)
odd = st.sampled_from(["null", "true", "7", '"x"', "[]", "{}", '"\\ud800"', "NaN", ""])
NUMBERS = """
    0 -0 1 01 1.0 1.10 0.000001 0.0000001 0.1234567 1e3 1E-3 -1 99999999999999 100000000000000 12345678901234.5
    12345678901234.56 123456789.123456 1234567890.123456 1.000000000000000000 1e400 0.1 1.
    """
TIMES = """
    2026-01-15T10:30:00Z 2026-01-15T10:30:00.123456Z 2026-01-15T10:30:00.1234567Z 2026-01-15T10:30:00.1Z
    2026-01-15T10:30:00+02:00 2026-01-15t10:30:00z 2026-02-30T00:00:00Z 2026-01-15T24:00:00Z 0000-01-01T00:00:00Z
    2026-01-15T10:30:60Z 2026-01-15T12:05:00Z 2026-01-15T12:05:01Z 2026-W03-4T10:30:00Z २०२६-01-15T10:30:00Z
    0001-01-01T00:00:00Z 9999-12-31T23:59:59Z 2026-01-15T10:30Z x
    """
numbers = st.one_of(
    st.sampled_from(NUMBERS.split()),
    st.integers(-5, 10**15).map(str),
    st.from_regex(r"[0-9]{1,15}(\.[0-9]{1,7})?", fullmatch=True),
)
decimals = quoted(st.one_of(numbers, st.sampled_from(["", "1.", "+1", " 1", "1e3", "१"])))
moments = quoted(
    st.one_of(
        st.datetimes().map(lambda moment: f"{moment.isoformat()}Z"),
        st.sampled_from([*TIMES.split(), "2026-01-15 10:30:00Z"]),
    )
)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
metadata = quoted(
    st.one_of(
        st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
        st.dictionaries(st.text(max_size=3), json_values, max_size=3),
    )
)


def members(**values: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[str, str]]]:
    """Members of a JSON object in any order, some of them odd, unknown or there twice."""
    known = [st.tuples(st.just(name), value | odd) for name, value in values.items()]
    unknown = st.tuples(st.just("quantiy"), numbers)
    required = [("event_type", '"api"'), ("tenant_id", '"acme"')]
    return st.lists(st.one_of(*known, unknown), max_size=4).map(lambda found: required + found)


def object_text(found: list[tuple[str, str]], space: str) -> str:
    return "{" + ",".join(f"{space}{json.dumps(name)}{space}:{space}{value}" for name, value in found) + "}"


event_members = members(
    event_type=texts,
    tenant_id=texts,
    quantity=numbers,
    quantity_decimal=decimals,
    idempotency_key=texts,
    metadata=metadata,
    timestamp=moments,
    reservation_id=texts | quoted(st.sampled_from(["r.1_-", "a:b", "r\n", "r" * 101])),
)
event_texts = st.builds(object_text, event_members, st.sampled_from(["", "", " ", "\n\t"]))
batch_texts = st.builds(
    lambda events, more: object_text([("events", "[" + ",".join(events) + "]"), *more], ""),
    st.lists(event_texts, max_size=4),
    st.sampled_from([[], [], [], [("partial", "true")], [("partial", "null")], [("event_type", '"a"')], [("x", "1")]]),
)
request_texts = st.one_of(event_texts, batch_texts).map(str.encode)

usual_events = st.fixed_dictionaries(
    {
        "event_type": st.text("aZ09_.:-", min_size=1, max_size=100),
        "tenant_id": st.text("aé 😀", min_size=1, max_size=100),
    },
    optional={
        "idempotency_key": st.text("aé/ 😀", min_size=1, max_size=255),
        "metadata": st.dictionaries(
            st.text(max_size=3).filter(lambda text: "\0" not in text),
            st.text('aé\n"\\😀') | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.none() | st.booleans(),
        ),
        "reservation_id": st.text("aZ09_.-", min_size=1, max_size=100),
        "timestamp": st.datetimes(max_value=NOW.replace(tzinfo=None)).map(lambda moment: f"{moment.isoformat()}Z"),
        "quantity": st.integers(1, 10**14 - 1) | st.decimals("0.001", 10**9, places=3).map(float),
    },
)


def transcoded(text: bytes) -> event_pb2.RecordEventsRequest:
    message = BINDING.request((), b"", text)
    assert isinstance(message, event_pb2.RecordEventsRequest)
    return message


def content_of(found: UsageEvent) -> dict[str, Any]:
    """All of it; an event without a key has another id whenever it is read."""
    fields = msgspec.structs.asdict(found)
    if found.idempotency_key is None:
        del fields["event_id"], fields["leaf_prefix"]
    return fields


def check_same(plain: PlainRequest, text: bytes) -> None:
    message = transcoded(text)
    expected = events_from_proto(ORG, message, now=NOW)
    assert all(isinstance(each, UsageEvent) for each in expected)
    assert [content_of(each) for each in plain.events] == [
        content_of(each) for each in expected if isinstance(each, UsageEvent)
    ]
    assert (plain.batch, plain.partial) == (bool(message.events), message.partial)


@settings(max_examples=300)
@given(request_texts)
def test_what_is_read_as_json_is_what_transcoding_makes_of_it(text: bytes) -> None:
    plain = events_from_json(ORG, text, now=NOW)
    event("unread" if plain is None else "read")
    if plain is not None:
        check_same(plain, text)


@given(st.lists(usual_events, min_size=1, max_size=4), st.booleans())
@example([PUBLISHED], False)
def test_usual_events_are_read_and_the_same(events: list[dict[str, Any]], batch: bool) -> None:
    text = json.dumps({"events": events} if batch else events[0]).encode()
    plain = events_from_json(ORG, text, now=NOW)
    assert plain is not None
    check_same(plain, text)


@pytest.mark.parametrize(
    "request_",
    [
        PUBLISHED,
        {"event_type": "api_request", "tenant_id": "acme"},
        {**PUBLISHED, "metadata": {"nested": {"n": [1, 2.5, True, None]}, "é": "ü"}},
        {**PUBLISHED, "quantity": 0.0001, "timestamp": "2026-01-15T10:30:00.123Z"},
        {**PUBLISHED, "reservation_id": "job.1"},
        {**PUBLISHED, "quantity": None, "quantity_decimal": "12345678901234.123456"},
        {"events": [PUBLISHED] * 1_000},
        {"events": [PUBLISHED], "partial": True},
    ],
)
def test_usual_requests_are_read(request_: dict[str, Any]) -> None:
    """The other way is right as well, and takes three times as long."""
    plain = events_from_json(ORG, json.dumps(request_).encode(), now=NOW)
    assert plain is not None
    assert len(plain.events) == len(request_.get("events", [1]))


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"{", b'{"events":[]}', b'{"events":[{}]}', b"\xff", b'"' * 10])
def test_what_is_no_request_is_left_unread(text: bytes) -> None:
    assert events_from_json(ORG, text, now=NOW) is None


def test_a_thousand_and_one_events_are_left_unread() -> None:
    text = json.dumps({"events": [PUBLISHED] * 1_001}).encode()
    assert events_from_json(ORG, text, now=NOW) is None
    with pytest.raises(Exception, match="events"):
        events_from_proto(ORG, transcoded(text), now=NOW)


def test_what_is_left_unread_for_a_fault_is_refused_by_the_edge() -> None:
    text = b'{"event_type":"a","tenant_id":"b","quantiy":5}'
    assert events_from_json(ORG, text, now=NOW) is None
    with pytest.raises(ApiError):
        transcoded(text)


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.booleans())
def test_an_answer_in_json_is_what_the_edge_prints_of_the_message(deduplicated: list[bool], batch: bool) -> None:
    results = [EventResult(new_uuid(), known, voided=False) for known in deduplicated]
    recorded = Recorded(results if batch else results[:1], ())
    message = batch_to_proto(recorded) if batch else single_to_proto(recorded)
    assert answer_to_json(recorded, batch=batch) == json_bytes(ENCODE(message))


def test_an_answer_that_says_more_goes_as_a_message() -> None:
    recorded = Recorded([EventResult(new_uuid(), deduplicated=True, voided=True)], ())
    assert answer_to_json(recorded, batch=False) is None
