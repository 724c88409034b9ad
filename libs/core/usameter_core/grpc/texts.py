"""Texts in requests: NUL, the one character that PostgreSQL does not store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from usameter_core.errors import FieldViolation

_NUL = "must not contain NUL (\\u0000)"


def nul_violations(request: Message) -> list[FieldViolation]:
    """The fields of a request whose text contains NUL, at any depth, e.g. `lines[2].line_id`.

    An entry of a map is named by its key, but for a key that has the NUL itself: then the map is named.
    The rule holds for every text of every request and is therefore here, and not in the contract at some
    140 fields, of which the next one would lack it.
    """
    # A text stands in the encoding as it is. Most requests have no zero byte at all, and are done with in a
    # microsecond; of the others most have it in a number.
    if b"\0" not in request.SerializeToString():
        return []
    return [FieldViolation(path, _NUL) for path in _with_nul(request, "")]


def _with_nul(message: Message, prefix: str) -> Iterator[str]:
    for field, value in message.ListFields():
        path = prefix + field.name
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            if any(isinstance(key, str) and "\0" in key for key in value):
                yield path
                continue
            kind = entry.fields_by_name["value"]
            for key in value:
                yield from _value_with_nul(kind, value[key], f"{path}[{key}]")
        elif field.is_repeated:
            for index, each in enumerate(value):
                yield from _value_with_nul(field, each, f"{path}[{index}]")
        else:
            yield from _value_with_nul(field, value, path)


def _value_with_nul(field: FieldDescriptor, value: Any, path: str) -> Iterator[str]:
    if field.type == FieldDescriptor.TYPE_STRING:
        if "\0" in value:
            yield path
    elif field.message_type is not None:
        yield from _with_nul(value, f"{path}.")
