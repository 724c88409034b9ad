"""JSON lines, CSV, and telling formats apart."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from usameter_cli.errors import UsageError
from usameter_cli.importing.access_log import Mapping, TenantField, metric_from_text
from usameter_cli.importing.formats import Format, read_records
from usameter_cli.importing.records import Record

EVENT = '{"event_type":"image","tenant_id":"acme"}'
LOG_LINE = '192.0.2.7 - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1" 200 5 "-" "x"'
MAPPING = Mapping("usage", TenantField.REMOTE_ADDR, [metric_from_text("hit=1")])


def read(text: str | bytes, format_: Format = Format.AUTO) -> list[Record]:
    raw = text.encode() if isinstance(text, str) else text
    return list(read_records(raw.splitlines(keepends=True), format_, MAPPING))


def events(text: str | bytes, format_: Format = Format.AUTO) -> list[dict[str, Any]]:
    return [msgspec.json.decode(event) for record in read(text, format_) for event in record.events]


def faults(text: str | bytes, format_: Format = Format.AUTO) -> list[tuple[int, str | None]]:
    return [(record.line, record.fault) for record in read(text, format_) if record.fault]


def test_a_json_line_without_a_key_gets_its_lines() -> None:
    assert events(f"\n{EVENT}\n") == [{"event_type": "image", "tenant_id": "acme", "idempotency_key": "usage:2:image"}]


def test_a_json_lines_own_key_is_kept_and_null_is_none() -> None:
    own = EVENT.replace("}", ',"idempotency_key":"mine"}')
    assert events(own)[0]["idempotency_key"] == "mine"
    assert events(own.replace('"mine"', "null"))[0]["idempotency_key"] == "usage:1:image"


def test_numbers_travel_as_they_were_written() -> None:
    line = EVENT.replace("}", ',"quantity":0.1000000000000000055,"metadata":{"n":9007199254740993}}')
    (record,) = read(line)
    assert b"0.1000000000000000055" in record.events[0]
    assert b"9007199254740993" in record.events[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"event_type":"image"', "is not JSON"),
        ('{"event_type":"image"} x', "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"tenant_id":"acme"}', "has no event_type"),
        ('{"event_type":"image"}', "has no tenant_id"),
        ('{"event_type":"image","tenant_id":7}', "tenant_id is not a string"),
    ],
)
def test_a_json_line_that_is_no_event_is_a_fault_of_that_line(line: str, reason: str) -> None:
    ((number, fault),) = faults(f"{EVENT}\n{line}\n{EVENT}")
    assert number == 2
    assert fault is not None and fault.startswith(reason)


def test_a_csv_row_is_an_event() -> None:
    text = (
        "event_type,tenant_id,quantity,timestamp,idempotency_key,metadata.region\r\n"
        "image,acme,2.50,2015-05-17T12:00:00+02:00,k1,eu\r\n"
        "image,acme,,,,\r\n"
    )
    assert events(text) == [
        {
            "event_type": "image",
            "tenant_id": "acme",
            "idempotency_key": "k1",
            "timestamp": "2015-05-17T10:00:00Z",
            "quantity_decimal": "2.5",
            "metadata": {"region": "eu"},
        },
        {"event_type": "image", "tenant_id": "acme", "idempotency_key": "usage:3:image"},
    ]


def test_csv_columns_come_in_any_order_and_metadata_may_be_json() -> None:
    text = 'tenant_id,metadata,event_type\n"ac,me","{""a"":[1,2]}",image\n'
    assert events(text) == [
        {
            "event_type": "image",
            "tenant_id": "ac,me",
            "idempotency_key": "usage:2:image",
            "metadata": {"a": [1, 2]},
        }
    ]


def test_a_csv_row_over_several_lines_has_the_number_of_its_first() -> None:
    text = 'event_type,tenant_id,metadata.note\nimage,a,"one\ntwo"\nimage,b,x\n'
    assert [event["idempotency_key"] for event in events(text)] == ["usage:2:image", "usage:4:image"]


@pytest.mark.parametrize(
    ("tail", "line"),
    [
        ("image,b,1", 3),
        ("image,b,1\r", 3),
        ("image,b", 3),
        ('image,b,"1', 3),
        ('image,b,1\nimage,"c\n', None),
        ('image,b,1\nimage,"c\nd",1', 4),
        (" ", 3),
    ],
)
def test_a_csv_row_whose_last_line_has_no_end_is_left_out(tail: str, line: int | None) -> None:
    records = read(f"event_type,tenant_id,quantity\nimage,a,1\n{tail}")
    assert [record.line for record in records if record.cut_off] == ([line] if line else [])
    assert len(records[0].events) == 1
    assert all(bool(record.events) + record.cut_off + (record.fault is not None) == 1 for record in records)


def test_a_csv_header_without_a_line_end_is_left_out() -> None:
    assert read("event_type,tenant_id,quan") == [Record(1, cut_off=True)]


def test_a_json_object_without_a_line_end_is_whole() -> None:
    assert len(events(f"{EVENT}\n{EVENT}")) == 2


@pytest.mark.parametrize("line", [EVENT, LOG_LINE])
def test_a_line_cut_anywhere_is_left_out_until_all_of_it_that_counts_is_there(line: str) -> None:
    whole = read(f"{line}\n{line}\n")
    # Of an access log's line the user agent does not count, nor its closing quote.
    counts = len(line) if line == EVENT else len(LOG_LINE.removesuffix('x"'))
    for length in range(1, len(line) + 1):
        expected = whole[1] if length >= counts else Record(2, cut_off=True)
        assert read(f"{line}\n{line[:length]}") == [whole[0], expected], line[:length]


@pytest.mark.parametrize("line", [EVENT, LOG_LINE])
def test_a_half_line_that_has_its_end_is_a_fault(line: str) -> None:
    assert [number for number, _ in faults(f"{line}\n{line[:30]}\n")] == [2]


@pytest.mark.parametrize("line", [EVENT, LOG_LINE, "event_type,tenant_id"])
def test_a_first_line_that_is_still_being_written_shows_no_format_yet(line: str) -> None:
    assert read(f"\n{line[:5]}") == [Record(2, cut_off=True)]


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        ("1", {"quantity": 1}),
        ("5.0", {"quantity": 5}),
        ("0.000001", {"quantity_decimal": "0.000001"}),
        ("123456789012345", {"quantity": 123456789012345}),
        ("1234567890123456", {"quantity_decimal": "1234567890123456"}),
    ],
)
def test_whole_quantities_are_numbers_and_others_are_exact_decimals(quantity: str, expected: dict[str, Any]) -> None:
    (event,) = events(f"event_type,tenant_id,quantity\nimage,acme,{quantity}\n")
    assert {name: event[name] for name in event if name.startswith("quantity")} == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("image,acme,1", "has 3 columns, the header 5"),
        (",acme,1,,", "has no event_type"),
        ("image,,1,,", "has no tenant_id"),
        ("image,acme,1e3,,", "quantity '1e3'"),
        ("image,acme,-1,,", "quantity '-1'"),
        ('image,acme,"1,000",,', "quantity '1,000'"),
        ("image,acme,1,2015-05-17T12:00:00,", "timestamp '2015-05-17T12:00:00' has no offset"),
        ("image,acme,1,yesterday,", "timestamp 'yesterday'"),
        ("image,acme,1,,[1]", "metadata is not a JSON object"),
        ('image,"acme"x,1,,', "is not CSV"),
    ],
)
def test_a_csv_row_that_is_no_event_is_a_fault_of_that_row(row: str, reason: str) -> None:
    head = "event_type,tenant_id,quantity,timestamp,metadata\n"
    ((number, fault),) = faults(f"{head}image,acme,1,,\n{row}\nimage,acme,1,,\n")
    assert number == 3
    assert fault is not None and fault.startswith(reason)


def test_bytes_that_are_not_utf8_are_a_fault_of_their_line() -> None:
    assert faults(b"event_type,tenant_id\nimage,\xff\nimage,b\n") == [(2, "is not UTF-8")]
    assert faults(b'{"event_type":"image","tenant_id":"a","metadata":{"b":"\xff"}}\n') == [(1, "is not UTF-8")]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("event_type,quantity", "no column tenant_id"),
        ("event_type,tenant_id,quantty", "a column 'quantty'"),
        ("event_type,tenant_id,tenant_id", "the column tenant_id twice"),
        ("event_type,tenant_id,metadata,metadata.a", "one of the two ways"),
    ],
)
def test_a_csv_header_that_cannot_be_used_is_named(header: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read(f"{header}\n", Format.CSV)


@pytest.mark.parametrize(
    ("text", "event_type"),
    [
        (EVENT, "image"),
        ("event_type,tenant_id\nimage,acme\n", "image"),
        (LOG_LINE, "hit"),
        (f"\n\n{LOG_LINE}\n", "hit"),
    ],
)
def test_a_format_is_known_by_its_first_line(text: str, event_type: str) -> None:
    assert [event["event_type"] for event in events(text)] == [event_type]


def test_an_unknown_format_is_an_error_and_an_empty_input_is_not() -> None:
    with pytest.raises(UsageError, match="--format"):
        read("event_type;tenant_id\n")
    with pytest.raises(UsageError, match="--format"):
        read("event_type;tenant_id\nimage;acme")
    assert read("") == []
    assert read("\n\n", Format.CSV) == []


def test_a_format_that_was_named_is_not_guessed() -> None:
    assert faults(f"{LOG_LINE}\n", Format.JSONL)[0][0] == 1
