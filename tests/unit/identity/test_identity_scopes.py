"""Scopes: the closed set, and who may grant which."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

import usameter
from usameter.common.v1 import options_pb2
from usameter_core.errors import InvalidArgument, PermissionDenied
from usameter_identity.domain.scopes import ALL_SCOPES, Scope, grant_scopes


def test_the_scopes_are_those_that_the_contracts_ask_for() -> None:
    descriptors = descriptor_pb2.FileDescriptorSet.FromString(
        (Path(usameter.__path__[0]) / "usameter.binpb").read_bytes()
    )
    methods = [method for file in descriptors.file for service in file.service for method in service.method]
    accesses = [method.options.Extensions[options_pb2.access] for method in methods]
    asked_for = {access.scope for access in accesses if access.WhichOneof("requirement") == "scope"}
    assert asked_for == ALL_SCOPES


def test_none_requested_means_all_that_the_maker_holds() -> None:
    held = frozenset({Scope.EVENTS_WRITE, Scope.USAGE_READ})
    assert grant_scopes([], held=held) == held


def test_a_maker_may_grant_all_it_holds_and_less() -> None:
    assert grant_scopes(["events:write", "usage:read"], held={"events:write", "usage:read"}) == {
        "events:write",
        "usage:read",
    }
    assert grant_scopes(["usage:read"], held={"events:write", "usage:read"}) == {"usage:read"}


def test_a_scope_that_the_maker_lacks_is_denied_and_the_first_is_named() -> None:
    with pytest.raises(PermissionDenied) as caught:
        grant_scopes(["events:write", "prices:write", "quotas:write"], held={"events:write"})
    assert caught.value.missing_scope == "prices:write"


def test_a_scope_that_does_not_exist_is_an_error_of_the_request() -> None:
    with pytest.raises(InvalidArgument) as caught:
        grant_scopes(["events:write", "evnts:write"], held=ALL_SCOPES)
    assert [each.field for each in caught.value.violations] == ["scopes[1]"]
