"""The specialised checks of requests to record come to the verdict of the contract's rules."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import protovalidate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usameter.ingest.v1 import event_pb2
from usameter_core.errors import InvalidArgument
from usameter_core.ids import OrgId
from usameter_ingest.domain.event import UsageEvent
from usameter_ingest.servicer import event_input
from usameter_ingest.servicer.event_input import RefusedEvent, events_from_proto

ORG = OrgId(UUID(int=1))
NOW = datetime(2026, 1, 15, tzinfo=UTC)

# Texts around every boundary of the rules: lengths, controls, separators, a trailing line end.
characters = st.one_of(
    st.sampled_from("azAZ09_.:- é\n\r\t\x00\x1f\x7f\x80\x9f\u2028\u2029\U0001f600"),
    st.integers(0, 0x2FFF).map(chr),
)
texts = st.one_of(
    st.text(characters, max_size=6),
    st.sampled_from(["", "a", "a" * 100, "a" * 101, "k" * 255, "k" * 256, "a\n", "é" * 100, "é" * 101]),
)
# Exact in six decimals, so that only the contract's own rule can object.
doubles = st.one_of(
    st.integers(-3, 10**14 + 3).map(float),
    st.decimals(min_value=-1, max_value=10**6, places=6).map(float),
    st.sampled_from([0.0, -0.0, 1e14, 99999999999999.0, float("nan"), float("inf"), float("-inf")]),
)
decimals = st.one_of(
    st.sampled_from(["", "0", "1", "01", "1.", ".5", "1.1234567", "1.123456", "1e3", "-1", "+1", " 1", "1\n", "१"]),
    st.from_regex(r"[0-9]{1,16}([.][0-9]{1,8})?", fullmatch=True),
)


def event_fields(**given: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"event_type": texts, "tenant_id": texts},
        optional={"idempotency_key": texts, "reservation_id": texts, **given},
    )


events = st.one_of(event_fields(quantity=doubles), event_fields(quantity_decimal=decimals))


def contract_violations(message: Any) -> set[str]:
    return {path_of(violation.proto.field.elements) for violation in protovalidate.collect_violations(message)}


def path_of(elements: Any) -> str:
    path = ""
    for element in elements:
        path += f".{element.field_name}" if path else element.field_name
        path += "" if element.subscript is None else f"[{element.subscript.value}]"
    return path


def our_violations(message: Any) -> set[str]:
    try:
        events_from_proto(ORG, message, now=NOW)
    except InvalidArgument as error:
        return {violation.field for violation in error.violations}
    return set()


@settings(max_examples=400)
@given(st.lists(events, min_size=1, max_size=3))
def test_both_name_the_same_fields_of_a_batch(batch: list[dict[str, Any]]) -> None:
    message = event_pb2.RecordEventsRequest(events=batch)
    # "0" is a well-formed decimal, and no quantity: a rule that no pattern states.
    zero = {
        f"events[{index}].quantity_decimal"
        for index, each in enumerate(batch)
        if each.get("quantity_decimal", "1").strip("0.") == "" and each.get("quantity_decimal")
    }
    assert our_violations(message) | zero == contract_violations(message) | zero


@settings(max_examples=200)
@given(events)
def test_both_name_the_same_fields_of_a_single_event(fields: dict[str, Any]) -> None:
    message = event_pb2.RecordEventsRequest(**fields)
    zero = fields.get("quantity_decimal", "1").strip("0.") == ""
    if not zero:
        assert our_violations(message) == contract_violations(message)


def test_both_allow_1000_events_and_refuse_1001() -> None:
    event = {"event_type": "e", "tenant_id": "t"}
    for count, expected in ((1_000, set()), (1_001, {"events"})):
        message = event_pb2.RecordEventsRequest(events=[event] * count)
        assert our_violations(message) == contract_violations(message) == expected


def test_a_partial_batch_keeps_its_good_events_and_names_each_bad_one() -> None:
    good = {"event_type": "e", "tenant_id": "t"}
    message = event_pb2.RecordEventsRequest(events=[good, {**good, "quantity": -1}, good], partial=True)
    first, second, third = events_from_proto(ORG, message, now=NOW)
    assert isinstance(first, UsageEvent) and isinstance(third, UsageEvent)
    assert isinstance(second, RefusedEvent)
    assert [violation.field for violation in second.error.violations] == ["events[1].quantity"]


def test_partial_is_for_batches_only() -> None:
    with pytest.raises(InvalidArgument, match="batches"):
        message = event_pb2.RecordEventsRequest(event_type="e", tenant_id="t", partial=True)
        events_from_proto(ORG, message, now=NOW)


def test_a_struct_that_is_far_too_large_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 1.4 million numbers held the process up for a second."""
    request = event_pb2.RecordEventsRequest(event_type="e", tenant_id="t")
    request.metadata.update({"a": [1] * 8_188})  # 16 KiB as JSON, 90,083 bytes as a Struct: no Struct has more
    (found,) = events_from_proto(ORG, request, now=NOW)
    assert isinstance(found, UsageEvent) and len(found.metadata) == 16_383
    request.metadata.update({"a": [1] * 100_000})
    monkeypatch.setattr(event_input, "json_from_struct", None)
    with pytest.raises(InvalidArgument, match="metadata: is more than 16384 bytes as JSON"):
        events_from_proto(ORG, request, now=NOW)
