"""Path, query and body of a route, together one request."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from usameter.common.v1 import error_pb2
from usameter_gateway.binding import Binding
from usameter_gateway.descriptors import HttpRule, Method, load_methods
from usameter_gateway.errors import ApiError
from usameter_gateway.request import Converters

METHODS = {method.descriptor.name: method for method in load_methods()}
Bind = Callable[..., Message]


def binding(name: str, rule: HttpRule | None = None, request: Descriptor | None = None) -> Bind:
    method = METHODS[name]
    if request is not None:
        method = Method(
            full_name=method.full_name,
            descriptor=method.descriptor,
            request=request,
            response=method.response,
            access=method.access,
            rules=method.rules,
        )
    bound = Binding(method, rule or method.rules[0], Converters())

    def bind(*values: str, query: str = "", body: str = "") -> Message:
        return bound.request(values, query.encode(), body.encode())

    return bind


def violations(bind: Callable[[], Message]) -> dict[str, str]:
    with pytest.raises(ApiError) as caught:
        bind()
    assert caught.value.reason == error_pb2.INVALID_ARGUMENT
    details = caught.value.details
    assert isinstance(details, error_pb2.ViolationDetails)
    return {each.field: each.description for each in details.violations}


def test_path_and_body_make_one_request() -> None:
    request = binding("SetQuota")("a/b", "x:y", body='{"limit_value": "5", "period": "daily"}')
    assert (request.tenant_id, request.event_type) == ("a/b", "x:y")  # type: ignore[attr-defined]
    assert (request.limit_value, request.period) == ("5", 2)  # type: ignore[attr-defined]


def test_a_field_of_the_path_is_not_repeated_in_the_body() -> None:
    bind = binding("SetQuota")
    assert violations(lambda: bind("a", "b", body='{"tenant_id": "a"}')) == {
        "tenant_id": "is given by the path; leave it out here"
    }


def test_a_field_of_the_path_is_not_repeated_in_the_query() -> None:
    bind = binding("GetQuota")
    assert violations(lambda: bind("a", "b", query="tenant_id=a")) == {
        "tenant_id": "is given by the path; leave it out here"
    }


def test_an_empty_body_is_an_empty_object() -> None:
    assert binding("FinalizeInvoice")("inv_1").invoice_id == "inv_1"  # type: ignore[attr-defined]


def test_a_route_without_a_body_takes_none() -> None:
    bind = binding("SealEpochs")
    assert bind(query="date=2026-01-15").date == "2026-01-15"  # type: ignore[attr-defined]
    for body in ('{"date": "2026-01-15"}', "[]", "null", "{", " "):
        assert violations(lambda body=body: bind(body=body)) == {"": "this route takes no body"}  # type: ignore[misc]


def test_an_empty_object_is_no_body() -> None:
    bind = binding("SealEpochs")
    assert bind(query="date=2026-01-15", body="{}\n").date == "2026-01-15"  # type: ignore[attr-defined]


def test_a_route_whose_body_is_the_request_takes_no_query() -> None:
    bind = binding("CheckQuota")
    assert violations(lambda: bind(query="quantity=1")) == {"quantity": "unknown query parameter"}


def test_query_parameters_set_scalars_enums_and_times() -> None:
    query = "tenant_id=a%2Fb+c&start_date=2026-01-15T10:30:00%2B02:00&group_by=DAY"
    request = binding("GetUsage")(query=query)
    assert request.tenant_id == "a/b c"  # type: ignore[attr-defined]
    assert request.start_date.seconds == 1768465800  # type: ignore[attr-defined]
    assert request.group_by == 3  # type: ignore[attr-defined]


def test_every_wrong_query_parameter_is_named() -> None:
    bind = binding("ListEvents")
    found = violations(lambda: bind(query="limit=ten&start_date=yesterday&tennant_id=x&tenant_id=a&tenant_id=b"))
    assert list(found) == ["limit", "start_date", "tennant_id", "tenant_id"]
    assert found["limit"] == "expected an integer, got a string"
    assert found["tennant_id"] == "unknown query parameter"
    assert found["tenant_id"] == "is given more than once"


@pytest.mark.parametrize("text", ["1.0", "1e2", "", " 1", "+1", "0x1", "٣", "1_000", "9" * 500])
def test_an_integer_in_a_query_is_written_as_in_json(text: str) -> None:
    bind = binding("ListEvents")
    assert list(violations(lambda: bind(query=f"limit={text.replace('+', '%2B')}"))) == ["limit"]


def test_violations_of_path_query_and_body_are_told_together() -> None:
    rule = HttpRule("POST", "/x/{tenant_id}", "metadata")
    bind = binding("RecordEvents", rule)
    found = violations(lambda: bind("a\0b", query="nope=1", body='{"n": 9007199254740993}'))
    assert list(found) == ["metadata.n", "nope", "tenant_id"]


def test_a_body_may_be_one_field(kinds: Descriptor) -> None:
    bind = binding("RecordEvents", HttpRule("POST", "/x", "inner"), kinds)
    request = bind(query="text=q&int64s=1&int64s=-2&flag=true", body='{"text": "b"}')
    assert request.inner.text == "b"  # type: ignore[attr-defined]
    assert list(request.int64s) == [1, -2]  # type: ignore[attr-defined]
    assert (request.text, request.flag) == ("q", True)  # type: ignore[attr-defined]
    assert not bind(body="null").HasField("inner")
    assert violations(lambda: bind(query="inner.text=x")) == {"inner.text": "unknown query parameter"}


def test_paths_reach_into_messages() -> None:
    rule = HttpRule("GET", "/prices/{price.currency}", "")
    request = binding("PreviewPrice", rule)("USD", query="price.model=flat&price.package.size=10&quantity=1")
    price = request.price  # type: ignore[attr-defined]
    assert (price.currency, price.model, price.package.size) == ("USD", 1, "10")


def test_a_boolean_in_a_query_is_true_or_false(kinds: Descriptor) -> None:
    bind = binding("RecordEvents", HttpRule("GET", "/x", ""), kinds)
    assert bind(query="flag=false").flag is False  # type: ignore[attr-defined]
    assert list(violations(lambda: bind(query="flag=1"))) == ["flag"]


def test_a_number_in_a_query_is_kept_or_refused_as_in_a_body(kinds: Descriptor) -> None:
    bind = binding("RecordEvents", HttpRule("GET", "/x", ""), kinds)
    assert bind(query="number=1.5").number == 1.5  # type: ignore[attr-defined]
    assert list(violations(lambda: bind(query="number=0.1234567890123456"))) == ["number"]
    assert list(violations(lambda: bind(query="number=NaN"))) == ["number"]


@pytest.mark.parametrize("query", ["tenant_id=%ff", "&".join(["tenant_id=1"] * 101)])
def test_a_query_that_cannot_be_read_is_refused(query: str) -> None:
    bind = binding("ListEvents")
    assert list(violations(lambda: bind(query=query))) == [""]


def test_a_rule_that_names_no_field_is_found_when_compiling() -> None:
    for rule in (HttpRule("GET", "/x/{nope}", ""), HttpRule("POST", "/x", "nope")):
        with pytest.raises(ValueError, match="names a field"):
            binding("RecordEvents", rule)
