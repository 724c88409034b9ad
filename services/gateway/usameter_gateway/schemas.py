"""JSON Schemas of messages, as the converters take and the encoders print them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import protovalidate
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from buf.validate import validate_pb2
from usameter.common.v1 import options_pb2
from usameter_gateway.descriptors import STRUCT, TIMESTAMP, message_class, message_type

Schema = dict[str, Any]

_WELL_KNOWN: dict[str, Schema] = {
    TIMESTAMP: {"type": "string", "format": "date-time"},
    STRUCT: {"type": "object"},
}
_SCALARS: dict[int, Schema] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number"},
}
# Rules of protovalidate by kind, and what JSON Schema calls them.
_RULES = {
    "string": {"pattern": "pattern", "min_len": "minLength", "max_len": "maxLength"},
    "int32": {"gte": "minimum", "lte": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"},
    "double": {"gte": "minimum", "lte": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"},
    "repeated": {"min_items": "minItems", "max_items": "maxItems", "unique": "uniqueItems"},
}


class Schemas:
    """Collects the schemas of the messages that are referred to.

    Args:
        comments: By full name.
        requests: Messages that clients send: they take no unknown fields, and what the rules of the
            contract need is required in them. Of the others it is what they always print.
    """

    def __init__(self, comments: Mapping[str, str], requests: Iterable[Descriptor]) -> None:
        self.components: dict[str, Schema] = {}
        self._comments = comments
        self._names: dict[str, str] = {}
        self._sent: set[str] = set()
        for descriptor in requests:
            self._mark_sent(descriptor)

    def _mark_sent(self, descriptor: Descriptor) -> None:
        if descriptor.full_name not in self._sent:
            self._sent.add(descriptor.full_name)
            for field in descriptor.fields:
                message = message_type(field)
                if message is not None and message.full_name not in _WELL_KNOWN:
                    self._mark_sent(message)

    def reference(self, descriptor: Descriptor) -> Schema:
        """A reference to a message's schema, which is then among the components.

        Raises:
            ValueError: Another message has the same short name.
        """
        if self._names.setdefault(descriptor.name, descriptor.full_name) != descriptor.full_name:
            raise ValueError(f"two messages named {descriptor.name} are reachable over REST")
        if descriptor.name not in self.components:
            # Registered before its fields: a message may contain itself.
            self.components[descriptor.name] = {}
            self.components[descriptor.name] = self.message(descriptor)
        return {"$ref": f"#/components/schemas/{descriptor.name}"}

    def message(self, descriptor: Descriptor, *, without: Iterable[str] = ()) -> Schema:
        """A message's schema, without some of its fields."""
        sent = descriptor.full_name in self._sent
        fields = [field for field in descriptor.fields if field.name not in without]
        needed = _needed(descriptor) if sent else _always_printed(descriptor)
        schema: Schema = {
            "type": "object",
            "properties": {field.name: self.field(field) for field in fields},
            "required": [field.name for field in fields if field.name in needed],
        }
        if sent:
            schema["additionalProperties"] = False
        if not schema["required"]:
            del schema["required"]
        return self._described(schema, descriptor.full_name)

    def field(self, field: FieldDescriptor) -> Schema:
        """A field's schema."""
        schema = dict(self._value(field))
        enum = field.enum_type
        if field.is_repeated:
            schema = {"type": "array", "items": schema}
        schema.update(_constraints(field))
        unset = field.GetOptions().Extensions[options_pb2.json_unset]
        if unset == options_pb2.JSON_UNSET_NULL:
            schema = _nullable(schema)
        described = self._described(schema, field.full_name)
        if enum is not None:
            described["description"] = "\n\n".join(
                [*filter(None, [described.get("description")]), *self._value_comments(enum)]
            )
        return {key: value for key, value in described.items() if value != ""}

    def _value(self, field: FieldDescriptor) -> Schema:
        message = message_type(field)
        if message is not None:
            return _WELL_KNOWN.get(message.full_name) or self.reference(message)
        if field.enum_type is not None:
            return {"type": "string", "enum": [each.name for each in _named(field.enum_type)]}
        return _SCALARS.get(field.type, {"type": "integer"})

    def _value_comments(self, enum: EnumDescriptor) -> list[str]:
        return [
            f"{value.name}: {self._comments[name]}"
            for value in _named(enum)
            if (name := f"{enum.full_name}.{value.name}") in self._comments
        ]

    def _described(self, schema: Schema, name: str) -> Schema:
        comment = self._comments.get(name)
        return {**schema, "description": comment} if comment else schema


def _named(enum: EnumDescriptor) -> list[Any]:
    return [value for value in enum.values if value.number != 0]


def _needed(descriptor: Descriptor) -> set[str]:
    """The fields that the rules of the contract need: those whose rules an empty message breaks."""
    violations = protovalidate.collect_violations(message_class(descriptor)())
    paths = [violation.proto.field for violation in violations]
    return {path.elements[0].field_name for path in paths if path is not None and path.elements}


def _always_printed(descriptor: Descriptor) -> set[str]:
    return {field.name for field in descriptor.fields if _is_always_printed(field)}


def _is_always_printed(field: FieldDescriptor) -> bool:
    unset = field.GetOptions().Extensions[options_pb2.json_unset]
    if unset == options_pb2.JSON_UNSET_UNSPECIFIED:
        return not field.has_presence
    return unset == options_pb2.JSON_UNSET_NULL


def _constraints(field: FieldDescriptor) -> Schema:
    rules = field.GetOptions().Extensions[validate_pb2.field]
    kind = rules.WhichOneof("type")
    if kind not in _RULES:
        return {}
    stated = {rule.name: value for rule, value in getattr(rules, kind).ListFields()}
    return {name: stated[rule] for rule, name in _RULES[kind].items() if rule in stated}


def _nullable(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}
