"""Metadata: one encoding, for ever."""

from __future__ import annotations

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from hypothesis import assume, given, strategies

from usameter_ingest.domain import metadata as metadata_module
from usameter_ingest.domain.metadata import METADATA_BYTES_MAX, InvalidMetadata, Json, decode_metadata, encode_metadata
from usameter_ingest.servicer.event_input import json_from_struct


def encoded(value: dict[str, Json]) -> bytes:
    """The same for JSON as it was parsed, and for what a Struct made of it."""
    found = encode_metadata(value)
    assert encode_metadata(json_from_struct(ParseDict(value, Struct()))) == found
    return found


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, b"{}"),
        ({"b": 1, "a": [True, None, "x"]}, b'{"a":[true,null,"x"],"b":1}'),
        ({"n": 1.0, "m": 0.1, "big": 1.5e15, "small": 1e-7}, None),
        ({"é": "ü", "quote": '"\\\n'}, '{"quote":"\\"\\\\\\n","é":"ü"}'.encode()),
        ({"max": 9007199254740992}, b'{"max":9007199254740992}'),
    ],
)
def test_the_encoding_is_fixed(value: dict[str, Json], expected: bytes | None) -> None:
    found = encoded(value)
    assert decode_metadata(found.decode()) == value
    if expected is not None:
        assert found == expected


def test_numbers_print_as_rfc_8785_says() -> None:
    numbers = {"a": 1.0, "b": 0.1, "c": -0.0, "d": 1.5e-7, "e": 1e-7, "f": 0.000001, "g": 0.0000015, "h": 0.00012}
    assert encoded({**numbers}) == (b'{"a":1,"b":0.1,"c":0,"d":1.5e-7,"e":1e-7,"f":0.000001,"g":0.0000015,"h":0.00012}')


def test_keys_sort_by_utf_16_code_units() -> None:
    """RFC 8785, section 3.2.3: a character beyond the basic plane sorts before U+FB33."""
    assert encoded({"\ufb33": 1, "\U0001f600": 2, "a": 3}) == '{"a":3,"\U0001f600":2,"\ufb33":1}'.encode()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"id": 9007199254740994}, "beyond 2\\^53"),
        ({"a": "x\x00"}, "NUL"),
        ({"a\x00": 1}, "NUL"),
        ({"a": "x" * 16_384}, "more than 16384 bytes as JSON"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused(value: dict[str, Json], sentence: str) -> None:
    with pytest.raises(InvalidMetadata, match=sentence):
        encoded(value)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [-0.0] * ((METADATA_BYTES_MAX - 8) // 2)},
        {"a": [5.0] * ((METADATA_BYTES_MAX - 8) // 2)},
        {"a": [[]] * ((METADATA_BYTES_MAX - 8) // 3)},
        {"a": [0.000001] * ((METADATA_BYTES_MAX - 8) // 9)},
        {"a": "x" * (METADATA_BYTES_MAX - 8)},
        {"ä": "ü" * ((METADATA_BYTES_MAX - 10) // 2)},
        {str(number): -0.0 for number in range(10_000, 10_000 + (METADATA_BYTES_MAX - 1) // 10)},
    ],
)
def test_16_kib_are_allowed_and_a_byte_more_is_not(value: dict[str, Json]) -> None:
    """However much longer a number is before it is canonical."""
    found = encoded(value)
    filling = METADATA_BYTES_MAX - len(found)
    assert filling < 10
    name, last = value.popitem()
    value[f"{name}{'x' * filling}"] = last
    assert len(encoded(value)) == METADATA_BYTES_MAX
    value[f"{name}{'x' * (filling + 1)}"] = value.popitem()[1]
    with pytest.raises(InvalidMetadata, match="more than 16384 bytes as JSON"):
        encoded(value)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1] * 2_000_000},
        {"a": [[{"b": [5.0] * 100}] * 100] * 100},
        {"a": 1, "b": "x" * 4_000_000},
        {str(number): "ü" for number in range(300_000)},
    ],
)
def test_what_is_far_too_large_is_refused_without_being_encoded(
    value: dict[str, Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding two million numbers once held a process up for more than a second."""
    monkeypatch.setattr(metadata_module, "_object", None)
    with pytest.raises(InvalidMetadata, match="more than 16384 bytes as JSON"):
        encode_metadata(value)


def test_nesting_is_bounded() -> None:
    value: dict[str, Json] = {}
    for _ in range(40):
        value = {"a": value}
    with pytest.raises(InvalidMetadata, match="levels"):
        encoded(value)


@given(strategies.dictionaries(strategies.text(), strategies.text(), max_size=4))
def test_objects_of_texts_are_encoded_like_nested_ones(texts: dict[str, str]) -> None:
    """They take a shorter way, which an object in an object does not."""
    assume("\x00" not in "".join([*texts, *texts.values()]))
    assert encode_metadata({"nested": texts}) == b'{"nested":' + encode_metadata(texts) + b"}"


def test_not_a_number_is_refused() -> None:
    struct = Struct()
    struct.fields["a"].number_value = float("nan")
    with pytest.raises(InvalidMetadata, match="NaN"):
        encode_metadata(json_from_struct(struct))
