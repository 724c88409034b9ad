"""Scalar fields: what JSON each of them takes.

Converters take a parsed JSON value and return what a protobuf constructor takes. They raise
`Refused` for a value that the field does not take.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

from usameter_gateway.literals import SIGNIFICANT_DIGITS_MAX, NumberLiteral
from usameter_gateway.violations import Refused

Converter = Callable[[Any], Any]

_INTEGER_15_DIGITS_END = 10**SIGNIFICANT_DIGITS_MAX


def kind_of(value: object) -> str:
    """What a JSON value is, for a sentence."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case NumberLiteral() | int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"


def string_from_json(value: Any) -> str:
    """Any Unicode text without NUL, which PostgreSQL does not store."""
    if type(value) is not str:
        raise Refused.because(f"expected a string, got {kind_of(value)}")
    if "\0" in value:
        raise Refused.because("a string must not contain NUL (\\u0000)")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused.because("a string must be valid Unicode; this has a lone surrogate") from None
    return value


def bool_from_json(value: Any) -> bool:
    """true or false."""
    if type(value) is not bool:
        raise Refused.because(f"expected true or false, got {kind_of(value)}")
    return value


def double_from_json(value: Any) -> float:
    """A number that a double carries as it is written; see `float_from_literal`."""
    if type(value) is float:
        return value
    if type(value) is int:
        if -_INTEGER_15_DIGITS_END < value < _INTEGER_15_DIGITS_END:
            return value
        return _double_from_long_integer(value)
    if type(value) is NumberLiteral:
        value.nearest_double()
        raise Refused.because(_ROUNDED)
    raise Refused.because(f"expected a number, got {kind_of(value)}")


_ROUNDED = f"more than {SIGNIFICANT_DIGITS_MAX} significant digits cannot be carried by a number"


def _double_from_long_integer(value: int) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise Refused.because("beyond the range of a double") from None
    # A double has at most 309 digits before the point, so this text is short.
    if len(str(abs(value)).rstrip("0")) > SIGNIFICANT_DIGITS_MAX:
        raise Refused.because(_ROUNDED)
    return number


def integer_converter(minimum: int, maximum: int) -> Converter:
    """A number without fraction or exponent within the bounds; 64-bit ones too are no strings."""

    def integer_from_json(value: Any) -> int:
        if type(value) is not int:
            raise Refused.because(f"expected an integer, got {_integer_kind(value)}")
        if not minimum <= value <= maximum:
            raise Refused.because(f"expected an integer from {minimum} to {maximum}")
        return value

    return integer_from_json


def _integer_kind(value: Any) -> str:
    if isinstance(value, float | NumberLiteral):
        return "a number with a fraction or exponent"
    return kind_of(value)


def enum_converter(enum: EnumDescriptor) -> Converter:
    """A value's name, in whatever case. The zero, which means unset, is no value to send.

    Raises:
        TypeError: Two names differ in case only.
    """
    values = [value for value in enum.values if value.number != 0]
    numbers = {value.name.lower(): value.number for value in values}
    if len(numbers) != len(values):
        raise TypeError(f"{enum.full_name}: two names differ in case only")
    names = ", ".join(value.name for value in values)

    def enum_from_json(value: Any) -> int:
        number = numbers.get(value.lower()) if type(value) is str else None
        if number is None:
            raise Refused.because(f"expected one of {names}")
        return number

    return enum_from_json


def bytes_from_json(value: Any) -> bytes:
    """Base64 of the standard alphabet, padded."""
    if type(value) is not str:
        raise Refused.because(f"expected base64 in a string, got {kind_of(value)}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise Refused.because("expected standard base64 with padding") from None


def scalar_converter(field: FieldDescriptor) -> Converter:
    """The converter of one value of a scalar field.

    Raises:
        TypeError: The type has no form in REST JSON. `float` is one: its 24 bits round silently.
    """
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return string_from_json
        case FieldDescriptor.TYPE_DOUBLE:
            return double_from_json
        case FieldDescriptor.TYPE_BOOL:
            return bool_from_json
        case FieldDescriptor.TYPE_ENUM:
            assert field.enum_type is not None
            return enum_converter(field.enum_type)
        case FieldDescriptor.TYPE_BYTES:
            return bytes_from_json
        case FieldDescriptor.TYPE_INT32 | FieldDescriptor.TYPE_SINT32 | FieldDescriptor.TYPE_SFIXED32:
            return integer_converter(-(2**31), 2**31 - 1)
        case FieldDescriptor.TYPE_INT64 | FieldDescriptor.TYPE_SINT64 | FieldDescriptor.TYPE_SFIXED64:
            return integer_converter(-(2**63), 2**63 - 1)
        case FieldDescriptor.TYPE_UINT32 | FieldDescriptor.TYPE_FIXED32:
            return integer_converter(0, 2**32 - 1)
        case FieldDescriptor.TYPE_UINT64 | FieldDescriptor.TYPE_FIXED64:
            return integer_converter(0, 2**64 - 1)
    raise TypeError(f"{field.full_name}: fields of its type have no form in REST JSON")
