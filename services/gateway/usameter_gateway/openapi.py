"""The OpenAPI 3.1 description of the REST surface, from the contract and its comments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from usameter.common.v1 import error_pb2, job_pb2, options_pb2
from usameter_gateway.descriptors import HTTP_BODY, HttpRule, Method, type_of
from usameter_gateway.errors import HTTP_STATUS
from usameter_gateway.parameters import Parameter, parameters_of
from usameter_gateway.request import Converters
from usameter_gateway.routes import parse_template
from usameter_gateway.schemas import Schema, Schemas

_DESCRIPTION = (
    "Meters usage, holds it to quotas and turns it into invoices that can be proven.\n\n"
    "JSON has the field names of the contract. An unknown field is an error. Quantities and amounts "
    "are decimal strings; a JSON number carries at most 15 significant digits. Times are RFC 3339 "
    "with a zone offset, intervals are half-open."
)

# The typed `details` of errors; see common/v1/error.proto.
_DETAILS: list[type[Message]] = [
    error_pb2.ViolationDetails,
    error_pb2.QuotaExceededDetails,
    error_pb2.RateLimitDetails,
    error_pb2.PermissionDetails,
    error_pb2.ResourceDetails,
    error_pb2.ConflictDetails,
    error_pb2.PreconditionDetails,
    error_pb2.PayloadDetails,
    error_pb2.AvailabilityDetails,
    error_pb2.InternalDetails,
]


def openapi(methods: Sequence[Method], comments: Mapping[str, str]) -> dict[str, Any]:
    """The document.

    Args:
        methods: Every method with a route.
        comments: Of the contract, by full name.
    """
    schemas = Schemas(comments, [method.request for method in methods])
    paths: dict[str, dict[str, Any]] = {}
    for method in methods:
        for index, rule in enumerate(method.rules):
            operation = _operation(method, rule, comments, schemas)
            if index:
                # Ids are unique; the first route has the method's name.
                operation["operationId"] += rule.verb.title()
            paths.setdefault(rule.template, {})[rule.verb.lower()] = operation
    services = {method.descriptor.containing_service.full_name for method in methods}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Usameter", "version": "1", "description": _DESCRIPTION},
        "tags": [{"name": name.rpartition(".")[2], "description": comments.get(name, "")} for name in sorted(services)],
        "paths": paths,
        "components": {
            "schemas": {"Error": _error_schema(schemas), **schemas.components},
            "responses": _error_responses(),
            "securitySchemes": {
                "api_key": {"type": "http", "scheme": "bearer", "description": "An API key, `usa_…`."},
                "cron_secret": {"type": "http", "scheme": "bearer", "description": "CRON_SECRET."},
            },
        },
    }


def _operation(method: Method, rule: HttpRule, comments: Mapping[str, str], schemas: Schemas) -> dict[str, Any]:
    comment = comments.get(method.full_name, "")
    scope, security = _access(method.access)
    variables = parse_template(rule.template).variables
    parameters = [
        _parameter(each, schemas, place="path" if each.name in variables else "query")
        for each in parameters_of(method.request, Converters()).values()
        if each.name in variables or (rule.body != "*" and each.path[0] != rule.body)
    ]
    operation: dict[str, Any] = {
        "operationId": method.descriptor.name,
        "tags": [method.descriptor.containing_service.name],
        "summary": _words(method.descriptor.name),
        "description": "\n\n".join(filter(None, [comment, scope])),
        "security": security,
        "parameters": parameters,
    }
    if rule.body:
        schema = _body_schema(method.request, rule, variables, schemas)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    operation["responses"] = _responses(method, rule, schemas)
    return operation


def _words(name: str) -> str:
    """ "RecordEvents" as "Record events"."""
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name)
    return spaced.strip().capitalize()


def _access(access: options_pb2.Access) -> tuple[str, list[dict[str, list[str]]]]:
    if access.cron:
        return "Needs the operator's CRON_SECRET.", [{"cron_secret": []}]
    return f"Needs the scope `{access.scope}`.", [{"api_key": [access.scope]}]


def _parameter(parameter: Parameter, schemas: Schemas, *, place: str) -> dict[str, Any]:
    schema = schemas.field(parameter.field)
    description = schema.pop("description", "")
    return {
        "name": parameter.name,
        "in": place,
        "required": place == "path",
        "schema": schema,
        **({"description": description} if description else {}),
    }


def _body_schema(request: Descriptor, rule: HttpRule, variables: tuple[str, ...], schemas: Schemas) -> Schema:
    if rule.body != "*":
        return schemas.field(request.fields_by_name[rule.body])
    return schemas.message(request, without=variables) if variables else schemas.reference(request)


def _responses(method: Method, rule: HttpRule, schemas: Schemas) -> dict[str, Any]:
    answer = {"description": "Done.", "content": _content(method.response, schemas)}
    responses: dict[str, Any] = {"200": answer}
    holds_job = method.response.full_name == job_pb2.Job.DESCRIPTOR.full_name or any(
        field.message_type is not None and field.message_type.full_name == job_pb2.Job.DESCRIPTOR.full_name
        for field in method.response.fields
    )
    if holds_job and rule.verb == "POST":
        responses["202"] = {**answer, "description": "Begun; the job tells how far it is."}
    statuses = {400, 401, 403, 500, 503}
    statuses |= set() if method.access.unlimited or method.access.cron else {429}
    statuses |= {404} if "{" in rule.template else set()
    statuses |= {409} if rule.verb != "GET" else set()
    statuses |= {413, 415} if rule.body else set()
    responses.update((str(status), {"$ref": f"#/components/responses/{status}"}) for status in sorted(statuses))
    return responses


def _content(response: Descriptor, schemas: Schemas) -> Schema:
    if response.full_name == HTTP_BODY:
        # Of which type it is, the comment of the method says.
        return {"*/*": {"schema": {"type": "string", "format": "binary"}}}
    return {"application/json": {"schema": schemas.reference(response)}}


def _error_schema(schemas: Schemas) -> Schema:
    return {
        "type": "object",
        "required": ["error", "code", "details"],
        "properties": {
            "error": {"type": "string", "description": "A sentence for people."},
            "code": {
                "type": "string",
                "enum": [error_pb2.ErrorReason.Name(reason) for reason in HTTP_STATUS],
                "description": "For programs.",
            },
            "details": {
                "description": "By code; empty where there is nothing to add.",
                "anyOf": [{"type": "object"}, *(schemas.reference(type_of(each)) for each in _DETAILS)],
            },
        },
    }


def _error_responses() -> dict[str, Any]:
    codes: dict[int, list[str]] = {}
    for reason, status in HTTP_STATUS.items():
        codes.setdefault(status, []).append(error_pb2.ErrorReason.Name(reason))
    schema = {"$ref": "#/components/schemas/Error"}
    return {
        str(status): {
            "description": ", ".join(names),
            "content": {"application/json": {"schema": schema}},
        }
        for status, names in codes.items()
    }
