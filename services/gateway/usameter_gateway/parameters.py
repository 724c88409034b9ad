"""The fields of a request that a text in the path or the query can set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from usameter_gateway.descriptors import STRUCT, TIMESTAMP, message_type
from usameter_gateway.json_text import number_from_text
from usameter_gateway.request import Converters
from usameter_gateway.scalars import Converter

_BOOLEANS = {"true": True, "false": False}
_TEXTUAL = {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_ENUM}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One such field; `path` leads to it from the request, `convert` takes a text."""

    path: tuple[str, ...]
    field: FieldDescriptor
    convert: Converter

    @property
    def name(self) -> str:
        """What it is called in templates and queries, e.g. "price.currency"."""
        return ".".join(self.path)


def parameters_of(descriptor: Descriptor, converters: Converters) -> dict[str, Parameter]:
    """By name: scalars and times, repeated or not, also those of inner messages."""
    return {each.name: each for each in _parameters(descriptor, converters, (), frozenset())}


def _parameters(
    descriptor: Descriptor, converters: Converters, path: tuple[str, ...], outer: frozenset[str]
) -> Iterator[Parameter]:
    # A message within itself could be named without end, so that is where it ends.
    outer |= {descriptor.full_name}
    for field in descriptor.fields:
        here = (*path, field.name)
        message = message_type(field)
        if message is None or message.full_name == TIMESTAMP:
            yield Parameter(here, field, _text_converter(field, converters.of_value(field)))
        elif message.full_name not in (STRUCT, *outer) and not field.is_repeated:
            yield from _parameters(message, converters, here, outer)


def _text_converter(field: FieldDescriptor, convert: Converter) -> Converter:
    if field.type in _TEXTUAL or field.message_type is not None:
        return convert
    if field.type == FieldDescriptor.TYPE_BOOL:
        return lambda text: convert(_BOOLEANS.get(text, text))
    return lambda text: convert(number_from_text(text))
