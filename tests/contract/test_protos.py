"""The contracts: every method says who may call it, and every HTTP route is one method's."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor

from usameter_core.grpc.auth import access_of

PROTOS = Path(__file__).parents[2] / "protos"
FILES = sorted(PROTOS.rglob("*.proto"))


def descriptor(path: Path) -> FileDescriptor:
    name = ".".join(path.relative_to(PROTOS).with_suffix("").parts) + "_pb2"
    found: FileDescriptor = importlib.import_module(name).DESCRIPTOR
    return found


def methods() -> list[MethodDescriptor]:
    return [
        method for path in FILES for service in descriptor(path).services_by_name.values() for method in service.methods
    ]


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
