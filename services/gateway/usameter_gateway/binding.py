"""One route's way from an HTTP request to a request message: path, query and body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from usameter_gateway.descriptors import HttpRule, Method, message_class
from usameter_gateway.errors import invalid_argument
from usameter_gateway.json_text import parse_json
from usameter_gateway.parameters import Parameter, parameters_of
from usameter_gateway.request import Converters
from usameter_gateway.routes import parse_template
from usameter_gateway.scalars import Converter
from usameter_gateway.violations import Refused, Violation

_TAKEN_FROM_PATH = "is given by the path; leave it out here"
_PARAMETERS_MAX = 100


class Binding:
    """Makes a method's request out of what one of its routes carries.

    Args:
        method: The method.
        rule: The route.
        converters: Compiled converters, shared by all routes.

    Raises:
        TypeError: The request has a field that has no form in REST.
        ValueError: The rule names a field that there is not.
    """

    def __init__(self, method: Method, rule: HttpRule, converters: Converters) -> None:
        self._create: Callable[..., Message] = message_class(method.request)
        parameters = parameters_of(method.request, converters)
        variables = parse_template(rule.template).variables
        unknown = set(variables) - set(parameters)
        if unknown or (rule.body not in ("", "*") and rule.body not in method.request.fields_by_name):
            raise ValueError(f"{method.full_name}: {rule} names a field that the request has not")
        self._variables = [parameters[name] for name in variables]
        self._path_names = frozenset(variables)
        # With body "*" every field is the body's, else those are the query's that nobody else has.
        self._query = (
            {}
            if rule.body == "*"
            else {
                name: parameter
                for name, parameter in parameters.items()
                if name not in self._path_names and parameter.path[0] != rule.body
            }
        )
        self._body = rule.body
        self._convert_body = _body_converter(method.request, rule.body, converters)

    def request(self, values: Sequence[str], query: bytes, body: bytes) -> Message:
        """The request message.

        Args:
            values: Of the template's variables, decoded, in order.
            query: The query string as it came.
            body: The whole body; empty and `{}` are the same.

        Raises:
            ApiError: INVALID_ARGUMENT with every violation, or MALFORMED_JSON.
        """
        violations: list[Violation] = []
        fields = self._fields_from_body(body, violations)
        self._add_query(fields, query, violations)
        for parameter, value in zip(self._variables, values, strict=True):
            _set(fields, parameter, [value], violations)
        if violations:
            raise invalid_argument(violations)
        return self._create(**fields)

    def _fields_from_body(self, body: bytes, violations: list[Violation]) -> dict[str, Any]:
        if self._convert_body is None:
            # Many schedulers send `{}` with every POST: it says nothing, so nothing is lost.
            if body and body.strip() != b"{}":
                violations.append(Violation("", "this route takes no body"))
            return {}
        value = parse_json(body) if body else {}
        if self._body != "*":
            value = {self._body: value}
        for parameter in self._variables:
            if _holds(value, parameter.path):
                violations.append(Violation(parameter.name, _TAKEN_FROM_PATH))
        try:
            fields: dict[str, Any] = self._convert_body(value)
        except Refused as refused:
            violations += refused.violations
            return {}
        return fields

    def _add_query(self, fields: dict[str, Any], query: bytes, violations: list[Violation]) -> None:
        if not query:
            return
        for name, texts in _query_texts(query).items():
            parameter = self._query.get(name)
            if parameter is not None:
                _set(fields, parameter, texts, violations)
            elif name in self._path_names:
                violations.append(Violation(name, _TAKEN_FROM_PATH))
            else:
                refused = Refused()
                refused.add(name, Refused.because("unknown query parameter"))
                violations += refused.violations


def _body_converter(descriptor: Descriptor, body: str, converters: Converters) -> Converter | None:
    if not body:
        return None
    if body == "*":
        return converters.of(descriptor)
    convert_field = converters.of_field(descriptor.fields_by_name[body])

    def convert(value: dict[str, Any]) -> dict[str, Any]:
        refused = Refused()
        try:
            return {body: None if value[body] is None else convert_field(value[body])}
        except Refused as inner:
            refused.add(body, inner)
        raise refused

    return convert


def _query_texts(query: bytes) -> dict[str, list[str]]:
    try:
        pairs = parse_qsl(query.decode(), keep_blank_values=True, errors="strict", max_num_fields=_PARAMETERS_MAX)
    except UnicodeDecodeError:
        raise invalid_argument([Violation("", "the query is not percent-encoded UTF-8")]) from None
    except ValueError:
        raise invalid_argument([Violation("", f"more than {_PARAMETERS_MAX} query parameters")]) from None
    texts: dict[str, list[str]] = {}
    for name, text in pairs:
        texts.setdefault(name, []).append(text)
    return texts


def _set(fields: dict[str, Any], parameter: Parameter, texts: list[str], violations: list[Violation]) -> None:
    refused = Refused()
    try:
        if len(texts) > 1 and not parameter.field.is_repeated:
            raise Refused.because("is given more than once")
        converted = [parameter.convert(text) for text in texts]
    except Refused as inner:
        refused.add(parameter.name, inner)
        violations += refused.violations
        return
    *parents, last = parameter.path
    for parent in parents:
        if fields.get(parent) is None:
            fields[parent] = {}
        fields = fields[parent]
    fields[last] = converted if parameter.field.is_repeated else converted[0]


def _holds(value: Any, path: Sequence[str]) -> bool:
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
    return True
