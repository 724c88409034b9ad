"""JSON to messages: what is taken, what is refused, and what the refusal says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from hypothesis import given
from hypothesis import strategies as st

from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2
from usameter_gateway.descriptors import load_methods, message_class, type_of
from usameter_gateway.errors import ApiError
from usameter_gateway.json_text import parse_json
from usameter_gateway.request import Converters
from usameter_gateway.violations import VIOLATIONS_MAX, Refused

Read = Callable[[str | bytes], Message]


@pytest.fixture(scope="module")
def read(kinds: Descriptor) -> Read:
    convert, create = Converters().of(kinds), message_class(kinds)

    def read_text(text: str | bytes) -> Message:
        return create(**convert(parse_json(text.encode() if isinstance(text, str) else text)))

    return read_text


def violations(read: Read, text: str | bytes) -> dict[str, str]:
    with pytest.raises(Refused) as caught:
        read(text)
    return dict(caught.value.violations)


VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "integer": 7,
    "negative": -7,
    "fraction": 1.5,
    "exponent": "1e2",
    "string": '"x"',
    "digits": '"7"',
    "array": "[]",
    "object": "{}",
    "true_string": '"true"',
    "name": '"DARK"',
    "time": '"2026-01-15T10:30:00Z"',
    "base64": '"eHg="',
}
TAKEN = {
    "text": {"string", "digits", "true_string", "name", "time", "base64"},
    "number": {"integer", "negative", "fraction", "exponent"},
    "flag": {"true"},
    "int32": {"integer", "negative"},
    "int64": {"integer", "negative"},
    "uint32": {"integer"},
    "uint64": {"integer"},
    "data": {"true_string", "name", "base64"},
    "shade": {"name"},
    "at": {"time"},
    "meta": {"object"},
    "inner": {"object"},
}


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("form", VALUES)
def test_each_kind_takes_its_own_form_and_refuses_every_other(read: Read, kind: str, form: str) -> None:
    value = VALUES[form]
    text = value if isinstance(value, str) else json.dumps(value)
    if form in TAKEN[kind] | {"null"}:
        read(f'{{"{kind}": {text}}}')
    else:
        assert list(violations(read, f'{{"{kind}": {text}}}')) == [kind]
    # Elements of arrays are judged alike, only that null is no element.
    if form in TAKEN[kind]:
        assert len(getattr(read(f'{{"{kind}s": [{text}, {text}]}}'), f"{kind}s")) == 2
    else:
        assert list(violations(read, f'{{"{kind}s": [{text}]}}')) == [f"{kind}s[0]"]


def test_a_violation_says_what_was_expected(read: Read) -> None:
    found = violations(
        read,
        '{"text": 1, "flag": "x", "number": "1", "int32": 1.0, "shade": "GREY", "inner": [], "texts": {}, "at": "now"}',
    )
    assert found == {
        "text": "expected a string, got a number",
        "flag": "expected true or false, got a string",
        "number": "expected a number, got a string",
        "int32": "expected an integer, got a number with a fraction or exponent",
        "shade": "expected one of DARK, light",
        "inner": "expected an object, got an array",
        "texts": "expected an array, got an object",
        "at": 'expected an RFC 3339 time with a zone offset, e.g. "2026-01-15T10:30:00Z"',
    }


def test_an_unknown_field_is_named_with_its_full_path() -> None:
    convert = Converters().of(type_of(event_pb2.RecordEventsRequest))
    with pytest.raises(Refused) as caught:
        convert(parse_json(b'{"events":[{},{},{},{"quantitty":5,"metadata":{"a":[{"b":9007199254740993}]}}]}'))
    assert [each.field for each in caught.value.violations] == [
        "events[3].quantitty",
        "events[3].metadata.a[0].b",
    ]


def test_violations_are_bounded(read: Read) -> None:
    found = violations(read, json.dumps({"inners": [{"nope": 1}] * 1000}))
    assert len(found) == VIOLATIONS_MAX


def test_a_hostile_field_name_makes_a_printable_path(read: Read) -> None:
    (path,) = violations(read, '{"\\ud800' + "x" * 1000 + '": 1}')
    assert path.startswith("\\ud800x") and len(path) < 120


@pytest.mark.parametrize("value", [[], "x", 1, None, True])
def test_a_body_that_is_no_object_is_refused(read: Read, value: Any) -> None:
    assert violations(read, json.dumps(value))[""].startswith("expected an object, got ")


@pytest.mark.parametrize(
    "literal",
    [
        "0.1",
        "123456789.123456",
        "1e300",
        "-0.000001",
        "1.50000000000000000000",
        "100000000000000000000",
        "0.0",
        "1E-300",
        "0e0",
    ],
)
def test_a_number_of_15_digits_is_taken_as_written(read: Read, literal: str) -> None:
    assert read(f'{{"number": {literal}}}').number == float(literal)


@pytest.mark.parametrize(
    "literal", ["0.1234567890123456", "1234567890123456", "12345678901234.12", "1.234567890123456e5"]
)
def test_a_number_of_16_digits_would_be_rounded_and_is_refused(read: Read, literal: str) -> None:
    assert violations(read, f'{{"number": {literal}}}') == {
        "number": "more than 15 significant digits cannot be carried by a number"
    }


@pytest.mark.parametrize("literal", ["1e309", "-1e309", "1" + "0" * 400])
def test_a_number_beyond_doubles_is_refused(read: Read, literal: str) -> None:
    assert violations(read, f'{{"number": {literal}}}') == {"number": "beyond the range of a double"}


@pytest.mark.parametrize("literal", ["1e-400", "1.5e-310"])
def test_a_number_too_small_for_a_double_is_not_taken_for_another(read: Read, literal: str) -> None:
    assert list(violations(read, f'{{"number": {literal}}}')) == ["number"]


@pytest.mark.parametrize("text", ['"NaN"', '"Infinity"', '"-Infinity"'])
def test_a_name_of_no_number_is_refused(read: Read, text: str) -> None:
    assert violations(read, f'{{"number": {text}}}') == {"number": "expected a number, got a string"}


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("int32", -(2**31), 2**31 - 1),
        ("int64", -(2**63), 2**63 - 1),
        ("uint32", 0, 2**32 - 1),
        ("uint64", 0, 2**64 - 1),
    ],
)
def test_integers_are_taken_up_to_their_bounds(read: Read, kind: str, low: int, high: int) -> None:
    assert getattr(read(f'{{"{kind}": {low}}}'), kind) == low
    assert getattr(read(f'{{"{kind}": {high}}}'), kind) == high
    expected = {kind: f"expected an integer from {low} to {high}"}
    assert violations(read, f'{{"{kind}": {low - 1}}}') == expected
    assert violations(read, f'{{"{kind}": {high + 1}}}') == expected


@pytest.mark.parametrize(("text", "number"), [("DARK", 1), ("dark", 1), ("light", 2), ("LIGHT", 2)])
def test_an_enum_is_read_by_name_in_any_case(read: Read, text: str, number: int) -> None:
    assert read(f'{{"shade": "{text}"}}').shade == number


def test_the_unspecified_value_is_no_value_to_send(read: Read) -> None:
    assert list(violations(read, '{"shade": "SHADE_UNSPECIFIED"}')) == ["shade"]


@pytest.mark.parametrize("field", ["text", "texts", "meta"])
@pytest.mark.parametrize("escape", ["\\u0000", "\\ud800", "\\udc00x"])
def test_a_string_that_cannot_be_stored_is_a_violation_that_names_it(read: Read, field: str, escape: str) -> None:
    value = {"text": f'"a{escape}"', "texts": f'["", "{escape}"]', "meta": f'{{"k": ["{escape}"]}}'}[field]
    path = {"text": "text", "texts": "texts[1]", "meta": "meta.k[0]"}[field]
    assert list(violations(read, f'{{"{field}": {value}}}')) == [path]


def test_a_surrogate_pair_is_one_character(read: Read) -> None:
    assert read('{"text": "\\ud83d\\ude00 é"}').text == "😀 é"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-15T10:30:00Z", datetime(2026, 1, 15, 10, 30, tzinfo=UTC)),
        ("2026-01-15T10:30:00+02:00", datetime(2026, 1, 15, 8, 30, tzinfo=UTC)),
        ("2026-01-15T10:30:00.5-00:30", datetime(2026, 1, 15, 11, 0, 0, 500_000, tzinfo=UTC)),
        ("1969-12-31T23:59:59.999999999Z", datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        ("2024-02-29T00:00:00Z", datetime(2024, 2, 29, tzinfo=UTC)),
    ],
)
def test_a_time_is_cut_to_microseconds(read: Read, text: str, expected: datetime) -> None:
    assert read(f'{{"at": "{text}"}}').at.ToDatetime(UTC) == expected


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-15",
        "2026-01-15T10:30:00",
        "2026-01-15 10:30:00Z",
        "2026-01-15T10:30Z",
        "2026-01-15T10:30:00+0200",
        "2026-01-15T10:30:00.Z",
        "2026-01-15T10:30:00.1234567890Z",
        "20260115T103000Z",
        "2026-W03-4T10:30:00Z",
        "2026-02-29T00:00:00Z",
        "2026-01-15T24:00:00Z",
        "2026-01-15T10:30:60Z",
        "0001-01-01T00:00:00+00:01",
        "9999-12-31T23:59:59-00:01",
        "٢026-01-15T10:30:00Z",
        "",
    ],
)
def test_a_time_that_is_not_rfc3339_with_an_offset_is_refused(read: Read, text: str) -> None:
    assert list(violations(read, json.dumps({"at": text}))) == ["at"]


def test_metadata_is_carried_as_it_is(read: Read) -> None:
    value = {"a": 1, "b": [True, None, {"c": "é"}], "d": 0.1, "e": {}, "f": -(2**53), "": ""}
    assert json_format.MessageToDict(read(json.dumps({"meta": value})).meta) == value


@pytest.mark.parametrize("number", [2**53 + 1, -(2**53) - 1])
def test_an_integer_in_metadata_that_a_double_does_not_hold_is_refused(read: Read, number: int) -> None:
    assert list(violations(read, json.dumps({"meta": {"n": number}}))) == ["meta.n"]


def test_a_long_fraction_in_metadata_is_the_nearest_double(read: Read) -> None:
    assert read('{"meta": {"pi": 3.14159265358979323846}}').meta["pi"] == math.pi
    assert list(violations(read, '{"meta": {"n": 1e999}}')) == ["meta.n"]


def test_metadata_may_be_32_levels_deep_and_no_deeper(read: Read) -> None:
    def nested(levels: int) -> str:
        return '{"meta": ' + '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1) + "}"

    read(nested(32))
    (description,) = violations(read, nested(33)).values()
    assert description == "nested deeper than 32 levels"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b'{"a": }', "line 1, column 7"),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6"),
        (b"{", "line 1, column 2"),
        (b"{} x", "line 1, column 4"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": "\xff"}', "byte 7"),
        (b"\xef\xbb\xbf{}", "line 1, column 1"),
        (b'{"a": 01}', "line 1, column 8"),
        (b"{'a': 1}", "line 1, column 2"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 100_000, "deep"),
        (b"\xff", "byte 0"),
    ],
)
def test_broken_json_is_malformed_and_says_where(text: bytes, where: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(text)
    assert caught.value.reason == error_pb2.MALFORMED_JSON
    assert where in caught.value.sentence


def test_of_equal_keys_the_last_counts(read: Read) -> None:
    assert read('{"text": "a", "text": "b"}').text == "b"
    assert read('{"text": "a", "text": "b", "texts": []}').text == "b"


def test_every_request_of_the_contract_has_a_form_in_json() -> None:
    converters = Converters()
    for method in load_methods():
        assert converters.of(method.request)({}) == {}


def test_what_has_no_form_in_json_is_found_when_compiling() -> None:
    with pytest.raises(TypeError, match="oneof"):
        Converters().of(type_of(Value))
    with pytest.raises(TypeError, match="maps"):
        Converters().of(type_of(Struct))


storable_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
doubles = st.one_of(
    st.integers(-(10**15) + 1, 10**15 - 1),
    st.decimals(-(10**6), 10**6, places=6, allow_nan=False).map(float),
)
# Bounds without a zone, as hypothesis wants them: away from the ends, where zones overflow.
times = st.datetimes(
    datetime(1, 1, 2),  # noqa: DTZ001
    datetime(9999, 12, 30),  # noqa: DTZ001
    timezones=st.just(UTC),
).map(lambda moment: moment.isoformat().replace("+00:00", "Z"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | storable_text | st.floats(-1e6, 1e6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(storable_text, inner, max_size=3),
    max_leaves=8,
)
scalars: dict[str, st.SearchStrategy[Any]] = {
    "text": storable_text,
    "number": doubles,
    "flag": st.booleans(),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint32": st.integers(0, 2**32 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "shade": st.sampled_from(["DARK", "light"]),
    "at": times,
    "meta": st.dictionaries(storable_text, json_values, max_size=4),
}
flat = st.fixed_dictionaries(
    {},
    optional={**scalars, **{f"{name}s": st.lists(each, max_size=3) for name, each in scalars.items()}},
)
objects = st.builds(
    lambda outer, inner, inners: {**outer, **inner, "inners": inners},
    flat,
    st.one_of(st.just({}), flat.map(lambda inner: {"inner": inner})),
    st.lists(flat, max_size=2),
)


@given(value=objects)
def test_accepted_json_means_what_protojson_says(kinds: Descriptor, value: dict[str, Any]) -> None:
    expected = json_format.ParseDict(value, message_class(kinds)())
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert message_class(kinds)(**Converters().of(kinds)(parse_json(text.encode()))) == expected


@given(number=st.floats(-1e300, 1e300))
def test_a_double_is_taken_where_15_digits_write_it(kinds: Descriptor, number: float) -> None:
    short = f"{number:.15g}"
    convert = Converters().of(kinds)
    if float(short) and abs(float(short)) < 2.2250738585072014e-308:
        return
    assert convert(parse_json(f'{{"number": {short}}}'.encode())) == {"number": float(short)}
