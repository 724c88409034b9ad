"""The contracts: every method says who may call it, and every HTTP route is one method's."""

from __future__ import annotations

from collections import Counter

import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor import MethodDescriptor

from tests.support.protos import methods
from usameter_core.grpc.auth import access_of


def routes(method: MethodDescriptor) -> list[tuple[str, str]]:
    rule = method.GetOptions().Extensions[annotations_pb2.http]
    rules = [rule, *rule.additional_bindings]
    return [
        (each.WhichOneof("pattern") or "", getattr(each, each.WhichOneof("pattern")))
        for each in rules
        if each.WhichOneof("pattern")
    ]


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.full_name)
def test_a_method_states_who_may_call_it_and_internal_ones_have_no_route(method: MethodDescriptor) -> None:
    requirement = access_of(method).WhichOneof("requirement")
    routed = requirement in {"scope", "cron"} and not (method.client_streaming or method.server_streaming)
    assert bool(routes(method)) == routed
    if requirement == "scope":
        assert all(path.startswith("/api/v1/") for _, path in routes(method))


def test_no_two_methods_share_a_route() -> None:
    counted = Counter(route for method in methods() for route in routes(method))
    assert counted and max(counted.values()) == 1


def test_lists_page_alike() -> None:
    for method in methods():
        fields = method.input_type.fields_by_name
        if method.name.startswith("List") and "page_token" in fields:
            assert "limit" in fields and fields["limit"].has_presence, method.full_name
            assert method.output_type.fields_by_name["next_page_token"].has_presence, method.full_name
