"""What an API key may be allowed to do: a closed set, the same as the scopes of all methods."""

from __future__ import annotations

from collections.abc import Sequence, Set
from enum import StrEnum

from usameter_core.errors import FieldViolation, InvalidArgument, PermissionDenied


class Scope(StrEnum):
    """A permission that a method's `access` option asks for. A test compares them with the contracts."""

    API_KEYS_READ = "api_keys:read"
    API_KEYS_WRITE = "api_keys:write"
    AUDIT_READ = "audit:read"
    EVENTS_READ = "events:read"
    EVENTS_WRITE = "events:write"
    INVOICES_READ = "invoices:read"
    INVOICES_WRITE = "invoices:write"
    ORGANIZATION_READ = "organization:read"
    PRICES_READ = "prices:read"
    PRICES_WRITE = "prices:write"
    QUOTAS_READ = "quotas:read"
    QUOTAS_WRITE = "quotas:write"
    TENANTS_READ = "tenants:read"
    USAGE_READ = "usage:read"


ALL_SCOPES: frozenset[str] = frozenset(Scope)


def grant_scopes(requested: Sequence[str], *, held: Set[str]) -> frozenset[str]:
    """The scopes of a new key: those requested, or all that its maker holds where none is requested.

    Args:
        requested: In the order of the request; errors name the first that is wrong.
        held: The scopes of the key that makes the new one. Nobody can hand on what they have not.

    Raises:
        InvalidArgument: A requested scope does not exist; every such one is named.
        PermissionDenied: The maker lacks a requested scope; the first is named.
    """
    unknown = [
        FieldViolation(f"scopes[{index}]", f"is no scope; there are {', '.join(sorted(ALL_SCOPES))}")
        for index, scope in enumerate(requested)
        if scope not in ALL_SCOPES
    ]
    if unknown:
        raise InvalidArgument(unknown)
    for scope in requested:
        if scope not in held:
            raise PermissionDenied(scope)
    return frozenset(requested) or frozenset(held)
