"""Messages to JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from usameter.billing.v1 import invoice_pb2, price_pb2
from usameter.common.v1 import error_pb2, job_pb2
from usameter.ingest.v1 import event_pb2
from usameter_gateway.descriptors import load_methods, message_class, type_of
from usameter_gateway.json_text import parse_json
from usameter_gateway.request import Converters
from usameter_gateway.response import Encoders, json_bytes

ENCODERS = Encoders()


def printed(message: Message) -> str:
    return json_bytes(ENCODERS.of(type_of(message))(message)).decode()


@pytest.fixture(scope="module")
def make(kinds: Descriptor) -> Callable[..., Message]:
    return message_class(kinds)


def test_the_answer_to_a_single_event_is_as_published() -> None:
    answer = event_pb2.RecordEventsResponse(success=True, event_id="evt_1", deduplicated=False)
    assert printed(answer) == '{"success":true,"event_id":"evt_1","deduplicated":false}'


def test_the_answer_to_a_batch_is_as_published() -> None:
    answer = event_pb2.RecordEventsResponse(
        success=True,
        count=2,
        new_events=1,
        duplicate_events=1,
        results=[
            {"event_id": "evt_1", "deduplicated": False},
            {"event_id": "evt_2", "deduplicated": True, "voided": False},
        ],
    )
    assert printed(answer) == (
        '{"success":true,"count":2,"new_events":1,"duplicate_events":1,"results":'
        '[{"event_id":"evt_1","deduplicated":false},{"event_id":"evt_2","deduplicated":true,"voided":false}]}'
    )


def test_quota_details_are_as_published() -> None:
    details = error_pb2.QuotaExceededDetails(limit=10000, current=10000, reset_at={"seconds": 1706745600})
    assert printed(details) == '{"limit":10000,"current":10000,"reset_at":"2024-02-01T00:00:00Z"}'
    assert printed(error_pb2.QuotaExceededDetails()) == '{"limit":0,"current":0,"reset_at":null}'


def test_an_event_without_invoice_prints_nulls() -> None:
    found = json.loads(printed(event_pb2.Event(id="evt_1", quantity=2)))
    assert found == {
        "id": "evt_1",
        "tenant_id": "",
        "event_type": "",
        "quantity": 2,
        "quantity_decimal": "",
        "idempotency_key": None,
        "invoice_id": None,
        "billed_at": None,
        "correction": None,
    }


def test_the_open_tier_prints_null_and_an_unpriced_flat_amount_nothing() -> None:
    price = price_pb2.Price(model=price_pb2.graduated, currency="USD", tiers=[{"unit_amount": "0.1"}])
    assert printed(price) == ('{"model":"graduated","currency":"USD","tiers":[{"up_to":null,"unit_amount":"0.1"}]}')


def test_a_draft_has_a_null_number_and_a_finalized_invoice_a_number() -> None:
    assert '"number":null' in printed(invoice_pb2.Invoice(status=invoice_pb2.draft))
    assert '"number":7' in printed(invoice_pb2.Invoice(status=invoice_pb2.open, number=7))


def test_scalars_without_presence_always_print_and_empty_lists_too() -> None:
    assert printed(job_pb2.Job()) == '{"id":"","state":"JOB_STATE_UNSPECIFIED","done":0,"total":0}'
    assert printed(event_pb2.ListEventsResponse()) == '{"events":[]}'


def test_unset_fields_print_as_their_option_says(make: Callable[..., Message]) -> None:
    unset = json.loads(printed(make()))
    assert unset["null_text"] is None
    assert not {"maybe_text", "absent_text", "absent_texts", "inner", "at", "meta"} & set(unset)
    given_values = json.loads(printed(make(maybe_text="", null_text="", absent_text="x", absent_texts=["y"])))
    assert given_values["maybe_text"] == given_values["null_text"] == ""
    assert (given_values["absent_text"], given_values["absent_texts"]) == ("x", ["y"])


def test_fields_print_in_order_of_their_numbers(make: Callable[..., Message]) -> None:
    names = list(json.loads(printed(make(inner={}, at={}))))
    numbers = [make.DESCRIPTOR.fields_by_name[name].number for name in names]  # type: ignore[attr-defined]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("value", "text"),
    [(10000.0, "10000"), (0.0, "0"), (-3.0, "-3"), (1.5, "1.5"), (0.1, "0.1"), (1e22, "1e22"), (float("nan"), "null")],
)
def test_doubles_print_short(make: Callable[..., Message], value: float, text: str) -> None:
    assert f'"number":{text},' in printed(make(number=value))


def test_64_bit_integers_print_as_numbers(make: Callable[..., Message]) -> None:
    assert '"int64":9007199254740991' in printed(make(int64=2**53 - 1))
    assert '"uint64":18446744073709551615' in printed(make(uint64=2**64 - 1))


@pytest.mark.parametrize(
    ("seconds", "nanos", "text"),
    [
        (0, 0, "1970-01-01T00:00:00Z"),
        (1768473000, 0, "2026-01-15T10:30:00Z"),
        (1768473059, 500_000_000, "2026-01-15T10:30:59.500Z"),
        (1768473000, 1_000, "2026-01-15T10:30:00.000001Z"),
        (1768473000, 1, "2026-01-15T10:30:00.000000001Z"),
        (-1, 999_999_000, "1969-12-31T23:59:59.999999Z"),
        (-62135596800, 0, "0001-01-01T00:00:00Z"),
        (253402300799, 0, "9999-12-31T23:59:59Z"),
    ],
)
def test_times_print_in_utc_with_as_few_decimals_as_carry_them(
    make: Callable[..., Message], seconds: int, nanos: int, text: str
) -> None:
    assert json.loads(printed(make(at={"seconds": seconds, "nanos": nanos})))["at"] == text


def test_metadata_prints_as_plain_json_in_order_of_its_keys(make: Callable[..., Message]) -> None:
    message = make(meta={"b": 1, "a": [1.5, None, True, {"x": ""}], "c": 1e300})
    assert '"meta":{"a":[1.5,null,true,{"x":""}],"b":1,"c":1e300}' in printed(message)


def test_bytes_print_as_base64_and_unknown_enum_values_as_numbers(make: Callable[..., Message]) -> None:
    found = json.loads(printed(make(data=b"\xff\x00", shade=9)))
    assert (found["data"], found["shade"]) == ("/wA=", 9)


def test_every_response_of_the_contract_has_a_form_in_json() -> None:
    for method in load_methods():
        json.loads(printed(message_class(method.response)()))


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
messages = st.fixed_dictionaries(
    {},
    optional={
        "text": texts,
        "number": st.decimals(-(10**6), 10**6, places=6, allow_nan=False).map(float),
        "flag": st.booleans(),
        "int64": st.integers(-(2**63), 2**63 - 1),
        "data": st.binary(max_size=8),
        "shade": st.sampled_from([1, 2]),
        "at": st.builds(
            lambda seconds, micros: {"seconds": seconds, "nanos": micros * 1000},
            st.integers(-62135596800, 253402300799),
            st.integers(0, 999_999),
        ),
        "meta": st.dictionaries(texts, texts | st.integers(-1000, 1000) | st.booleans() | st.none(), max_size=3),
        "texts": st.lists(texts, max_size=3),
        "maybe_text": texts,
        "null_text": texts,
    },
)


def without_defaults(value: Any) -> Any:
    """What ProtoJSON would leave out, left out; 64-bit numbers as ProtoJSON writes them."""
    kept = {key: each for key, each in value.items() if each not in (None, [], 0, "", False) or key == "meta"}
    return {key: str(each) if key == "int64" else each for key, each in kept.items() if each != "SHADE_UNSPECIFIED"}


@given(values=messages)
def test_what_is_printed_is_protojson_but_for_the_documented_differences(
    kinds: Descriptor, values: dict[str, Any]
) -> None:
    message = message_class(kinds)(**values)
    expected = json_format.MessageToDict(message, preserving_proto_field_name=True)
    assert without_defaults(json.loads(printed(message))) == without_defaults(expected)


@given(values=messages)
def test_what_is_printed_can_be_sent_again(kinds: Descriptor, values: dict[str, Any]) -> None:
    message = message_class(kinds)(**values)
    document = parse_json(printed(message).encode())
    document = {key: each for key, each in document.items() if each != "SHADE_UNSPECIFIED"}
    assert message_class(kinds)(**Converters().of(kinds)(document)) == message
