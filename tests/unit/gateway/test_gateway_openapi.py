"""The description of the REST surface agrees with the contract."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from usameter_gateway.comments import comments_of
from usameter_gateway.descriptors import load_descriptor_set, load_methods
from usameter_gateway.openapi import openapi

METHODS = load_methods()


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi(METHODS, comments_of(load_descriptor_set()))


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from references(each)


def test_every_route_is_described_once(document: dict[str, Any]) -> None:
    described = {(verb.upper(), path) for path, item in document["paths"].items() for verb in item}
    assert described == {(rule.verb, rule.template) for method in METHODS for rule in method.rules}
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for reference in set(references(document)):
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
        assert target


def test_every_variable_of_a_path_is_a_required_parameter(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for operation in item.values():
            inside = {each["name"] for each in operation["parameters"] if each["in"] == "path" and each["required"]}
            assert inside == set(re.findall(r"\{(\w+)\}", path))


def test_comments_scopes_and_rules_of_the_contract_are_told(document: dict[str, Any]) -> None:
    record = document["paths"]["/api/v1/events"]["post"]
    assert "committed, deduplicated" in record["description"]
    assert "`events:write`" in record["description"]
    assert record["security"] == [{"api_key": ["events:write"]}]
    assert document["paths"]["/api/cron/snapshots"]["post"]["security"] == [{"cron_secret": []}]
    request = document["components"]["schemas"]["RecordEventsRequest"]
    assert request["additionalProperties"] is False
    assert request["properties"]["events"]["maxItems"] == 1000
    assert request["properties"]["quantity"]["exclusiveMinimum"] == 0
    assert "A batch." in request["properties"]["events"]["description"]


def test_null_and_absent_fields_are_told_apart(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    event = schemas["Event"]
    assert event["properties"]["invoice_id"]["type"] == ["string", "null"]
    assert "invoice_id" in event["required"]
    assert "next_page_token" not in schemas["ListEventsResponse"].get("required", [])
    assert schemas["Invoice"]["properties"]["status"]["enum"] == ["draft", "open", "paid", "void", "uncollectible"]


def test_what_the_rules_need_is_required(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["EventInput"]["required"] == ["event_type", "tenant_id"]
    assert schemas["CreatePriceRequest"]["required"] == ["event_type", "effective_from", "price"]
    assert "required" not in schemas["RecordEventsRequest"]


def test_fields_of_the_path_are_not_in_the_body(document: dict[str, Any]) -> None:
    put = document["paths"]["/api/v1/quotas/{tenant_id}/{event_type}"]["put"]
    body = put["requestBody"]["content"]["application/json"]["schema"]
    assert "limit_value" in body["properties"]
    assert not {"tenant_id", "event_type"} & set(body["properties"])


def test_an_answer_that_is_a_file_is_no_json(document: dict[str, Any]) -> None:
    responses = document["paths"]["/api/v1/invoices/{invoice_id}/pdf"]["get"]["responses"]
    assert responses["200"]["content"] == {"*/*": {"schema": {"type": "string", "format": "binary"}}}
    assert responses["404"] == {"$ref": "#/components/responses/404"}
    assert "HttpBody" not in document["components"]["schemas"]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = resources.files("usameter_gateway").joinpath("docs.html").read_text()
    assert not re.findall(r"(?:src|href)=|https?://|@import|\burl\(", page)
