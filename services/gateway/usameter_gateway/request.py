"""JSON objects as request messages, strictly: nothing is dropped, rounded or guessed.

Converters are compiled once per message type. They check a parsed JSON object and make it, in
place, the nested dicts that a protobuf constructor takes at C speed. What is wrong is found before a
message is made, all of it.

1,000 events of the published example: 0.9 ms to parse, 1.8 to check and convert, 3.4 to construct
(2.7 of them are protobuf's own Python code for Struct); json_format.Parse takes 49 ms.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from usameter_gateway.descriptors import STRUCT, TIMESTAMP, message_type
from usameter_gateway.scalars import Converter, kind_of, scalar_converter, string_from_json
from usameter_gateway.violations import Refused
from usameter_gateway.wellknown import struct_from_json, timestamp_from_json


class Converters:
    """Converters by message type, compiled on first use."""

    def __init__(self) -> None:
        self._by_name: dict[str, Converter] = {}

    def of(self, descriptor: Descriptor) -> Converter:
        """What turns JSON objects into constructor arguments of this message type.

        A null stays: constructors take it for an unset field.

        Raises:
            TypeError: The type has a field that has no form in REST JSON, e.g. a map.
        """
        convert = self._by_name.get(descriptor.full_name)
        if convert is None:
            # Registered before its fields are compiled: a message may contain itself.
            fields: dict[str, Converter] = {}
            convert = self._by_name[descriptor.full_name] = _object_converter(fields)
            fields.update((field.name, self.of_field(field)) for field in descriptor.fields)
        return convert

    def of_field(self, field: FieldDescriptor) -> Converter:
        """What converts the JSON value of one field, an array where it is repeated."""
        convert = self.of_value(field)
        return _array_converter(convert) if field.is_repeated else convert

    def of_value(self, field: FieldDescriptor) -> Converter:
        """What converts one value of a field: the whole, or one element where it is repeated."""
        oneof = field.containing_oneof
        if oneof is not None and not (len(oneof.fields) == 1 and oneof.name == f"_{field.name}"):
            # The constructor would keep one of two that are given, without a word.
            raise TypeError(f"{field.full_name}: a oneof has no form in REST requests")
        message = message_type(field)
        if message is None:
            return scalar_converter(field)
        if message.full_name == TIMESTAMP:
            return timestamp_from_json
        return struct_from_json if message.full_name == STRUCT else self.of(message)


def _object_converter(fields: dict[str, Converter]) -> Converter:
    def convert_object(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise Refused.because(f"expected an object, got {kind_of(value)}")
        refusals = None
        for name, item in value.items():
            convert = fields.get(name)
            # Most fields are ASCII texts: passed here without a call.
            if convert is string_from_json and type(item) is str and item.isascii() and "\0" not in item:
                continue
            try:
                if convert is None:
                    raise Refused.because("unknown field")
                if item is not None:
                    value[name] = convert(item)
            except Refused as refused:
                refusals = refusals or Refused()
                refusals.add(name, refused)
        if refusals:
            raise refusals
        return value

    return convert_object


def _array_converter(convert: Converter) -> Converter:
    def convert_array(value: Any) -> list[Any]:
        if type(value) is not list:
            raise Refused.because(f"expected an array, got {kind_of(value)}")
        refusals = None
        for index, item in enumerate(value):
            try:
                value[index] = convert(item)
            except Refused as refused:
                refusals = refusals or Refused()
                refusals.add(index, refused)
                if refusals.is_full:
                    break
        if refusals:
            raise refusals
        return value

    return convert_array
