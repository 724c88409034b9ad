"""Metadata: a JSON object, encoded once into the bytes that are stored and hashed.

In the form of RFC 8785 (JSON Canonicalization Scheme), which any language can reproduce: keys sorted
by UTF-16 code units, no white space, numbers as ECMAScript prints them. The encoding can never
change: request hashes cover it.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import TypeAlias

import msgspec

METADATA_BYTES_MAX = 16 * 1024
EMPTY = b"{}"

_DEPTH_MAX = 32
_POSITIONAL_EXPONENT_MIN = -6
# Beyond it a double no longer tells neighbouring integers apart (2^53).
_INTEGER_MAX = 9_007_199_254_740_992

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

# The escapes of the standard library, without its \u escapes for what is not ASCII.
_quoted = json.encoder.encode_basestring
# The same text for an object of ASCII texts, in a third of the time.
_encode_texts = msgspec.json.Encoder(order="sorted").encode
# Another text for other objects, in a fiftieth of the time: `-0.0` has four characters where the canonical `0` has one,
# with a comma five and two, and nothing else is longer by more.
_encode_roughly = msgspec.json.Encoder().encode
_ROUGH_BYTES_MAX = 3 * METADATA_BYTES_MAX


class InvalidMetadata(ValueError):
    """The text says what is wrong, for the field's violation."""


def encode_metadata(metadata: dict[str, Json]) -> bytes:
    """The canonical bytes.

    Raises:
        InvalidMetadata: Too large, too deep, an integer beyond 2^53, a number that is none, or a NUL.
    """
    if not metadata:
        return EMPTY
    encoded = _encode_texts(metadata) if set(map(type, metadata.values())) == {str} else b""
    if not encoded or not encoded.isascii():
        # What is far too large is not encoded to find that out: two million numbers held everybody up for a second.
        if len(_encode_roughly(metadata)) > _ROUGH_BYTES_MAX:
            raise too_large()
        encoded = _object(metadata, 1).encode()
    if len(encoded) > METADATA_BYTES_MAX:
        raise too_large()
    if b"\\u0000" in encoded and "\x00" in _strings(metadata):
        raise InvalidMetadata("holds a NUL character")
    return encoded


def decode_metadata(encoded: str) -> dict[str, Json]:
    """The object in stored bytes."""
    decoded: dict[str, Json] = json.loads(encoded)
    return decoded


def too_large() -> InvalidMetadata:
    """For whoever can tell before the object is there."""
    return InvalidMetadata(f"is more than {METADATA_BYTES_MAX} bytes as JSON")


def _object(value: dict[str, Json], depth: int) -> str:
    if depth > _DEPTH_MAX:
        raise InvalidMetadata(f"is nested deeper than {_DEPTH_MAX} levels")
    keys = sorted(value)
    if not "".join(keys).isascii():
        keys.sort(key=lambda key: key.encode("utf-16-be"))
    return "{" + ",".join([f"{_quoted(key)}:{_value(value[key], depth)}" for key in keys]) + "}"


def _value(value: Json, depth: int) -> str:
    match value:
        case str():
            return _quoted(value)
        case bool():
            return "true" if value else "false"
        case int() | float():
            return _number(value)
        case None:
            return "null"
        case dict():
            return _object(value, depth + 1)
        case _:
            if depth + 1 > _DEPTH_MAX:
                raise InvalidMetadata(f"is nested deeper than {_DEPTH_MAX} levels")
            return "[" + ",".join([_value(each, depth + 1) for each in value]) + "]"


def _number(number: float) -> str:
    if isinstance(number, float) and not number.is_integer():
        if not math.isfinite(number):
            raise InvalidMetadata("holds a number that JSON cannot carry (NaN or infinity)")
        return _fraction(repr(number))
    if abs(number) > _INTEGER_MAX:
        raise InvalidMetadata("holds an integer beyond 2^53; send it as a string")
    return str(int(number))


def _fraction(text: str) -> str:
    """A fraction's shortest form, with ECMAScript's exponents: 0.00001 and 1e-7, where Python has 1e-05 and 1e-07."""
    mantissa, _, exponent = text.partition("e")
    if not exponent:
        return text
    if int(exponent) >= _POSITIONAL_EXPONENT_MIN:
        return format(Decimal(text), "f")
    return f"{mantissa}e{int(exponent)}"


def _strings(value: Json) -> str:
    """All keys and texts of a value, joined."""
    match value:
        case str():
            return value
        case dict():
            return "".join(key + _strings(each) for key, each in value.items())
        case list():
            return "".join(map(_strings, value))
        case _:
            return ""
