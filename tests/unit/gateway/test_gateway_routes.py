"""Path templates and the tree that finds them."""

from __future__ import annotations

import pytest

from usameter.common.v1 import error_pb2
from usameter_gateway.descriptors import load_methods
from usameter_gateway.errors import ApiError
from usameter_gateway.routes import Router, parse_template


@pytest.fixture
def router() -> Router[str]:
    made: Router[str] = Router()
    for verb, template in [
        ("POST", "/api/v1/events"),
        ("GET", "/api/v1/events"),
        ("GET", "/api/v1/events/{event_id}"),
        ("POST", "/api/v1/events/{event_id}:void"),
        ("PUT", "/api/v1/quotas/{tenant_id}/{event_type}"),
        ("POST", "/api/v1/quotas/{tenant_id}/{event_type}:check"),
        ("POST", "/api/v1/quotas:check"),
        ("GET", "/api/v1/quotas/{tenant_id}/summary"),
        ("GET", "/api/v1/{resource=*}/{a.b}/x"),
    ]:
        made.add(verb, template, f"{verb} {template}")
    return made


def reason(router: Router[str], verb: str, path: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        router.find(verb, path)
    return caught.value


@pytest.mark.parametrize(
    ("verb", "path", "target", "values"),
    [
        ("POST", "/api/v1/events", "POST /api/v1/events", []),
        ("GET", "/api/v1/events/evt_1", "GET /api/v1/events/{event_id}", ["evt_1"]),
        ("POST", "/api/v1/events/evt_1:void", "POST /api/v1/events/{event_id}:void", ["evt_1"]),
        ("POST", "/api/v1/quotas:check", "POST /api/v1/quotas:check", []),
        ("GET", "/api/v1/quotas/t/summary", "GET /api/v1/quotas/{tenant_id}/summary", ["t"]),
        ("GET", "/api/v1/events/e/x", "GET /api/v1/{resource=*}/{a.b}/x", ["events", "e"]),
    ],
)
def test_a_path_finds_its_template(router: Router[str], verb: str, path: str, target: str, values: list[str]) -> None:
    assert router.find(verb, path) == (target, values)


@pytest.mark.parametrize(
    ("segment", "value"),
    [("a%2Fb", "a/b"), ("a%20b", "a b"), ("%C3%A9", "é"), ("a+b", "a+b"), ("%2525", "%25"), ("a:b:c", "a:b:c")],
)
def test_a_segment_is_decoded_after_splitting(router: Router[str], segment: str, value: str) -> None:
    assert router.find("PUT", f"/api/v1/quotas/{segment}/y")[1] == [value, "y"]


def test_a_colon_belongs_to_the_value_where_no_verb_route_takes_the_method(router: Router[str]) -> None:
    assert router.find("PUT", "/api/v1/quotas/t/a:check")[1] == ["t", "a:check"]
    assert router.find("POST", "/api/v1/quotas/t/a:check")[1] == ["t", "a"]
    assert router.find("POST", "/api/v1/quotas/t/a:b:check")[1] == ["t", "a:b"]
    assert router.find("GET", "/api/v1/events/e:void")[1] == ["e:void"]


def test_an_encoded_colon_is_never_a_custom_verb(router: Router[str]) -> None:
    assert router.find("GET", "/api/v1/events/e%3Avoid")[1] == ["e:void"]
    assert reason(router, "POST", "/api/v1/events/e%3Avoid").reason == error_pb2.METHOD_NOT_ALLOWED


def test_get_routes_answer_head(router: Router[str]) -> None:
    assert router.find("HEAD", "/api/v1/events") == ("GET /api/v1/events", [])


def test_another_method_is_told_the_right_ones(router: Router[str]) -> None:
    error = reason(router, "DELETE", "/api/v1/events")
    assert error.reason == error_pb2.METHOD_NOT_ALLOWED
    assert error.headers == ((b"allow", b"GET, HEAD, POST"),)


@pytest.mark.parametrize(
    "path",
    ["/", "", "/api/v1", "/api/v1/events/", "/api/v1/events/a/b", "//api/v1/events", "/api/v1/quotas//x", "*"],
)
def test_an_unknown_path_is_not_found(router: Router[str], path: str) -> None:
    assert reason(router, "GET", path).reason == error_pb2.NOT_FOUND


def test_a_path_that_is_no_utf8_is_refused(router: Router[str]) -> None:
    assert reason(router, "GET", "/api/v1/events/%ff").reason == error_pb2.INVALID_ARGUMENT


@pytest.mark.parametrize("text", ["api", "/a/{b=**}", "/a/{b=c/*}", "/a/x{b}", "/a//b", "/a/{}", "/a b"])
def test_what_the_contract_does_not_use_is_no_template(text: str) -> None:
    with pytest.raises(ValueError, match="not a path template"):
        parse_template(text)


def test_a_route_is_added_once(router: Router[str]) -> None:
    with pytest.raises(ValueError, match="two routes"):
        router.add("GET", "/api/v1/events/{id}", "again")


def test_every_route_of_the_contract_finds_itself() -> None:
    router: Router[tuple[str, str]] = Router()
    routes = [(rule.verb, rule.template) for method in load_methods() for rule in method.rules]
    for verb, template in routes:
        router.add(verb, template, (verb, template))
    for verb, template in routes:
        path = template.replace("{", "").replace("}", "")
        target, values = router.find(verb, path)
        assert target == (verb, template)
        assert values == list(parse_template(template).variables)
