"""What a call knows of itself: its request id, its caller and its deadline.

Set by the interceptors, for the task that serves the call.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from uuid import uuid4

from usameter_core.errors import Internal
from usameter_core.ids import OrgId


@dataclass(frozen=True, slots=True)
class Principal:
    """The holder of an API key."""

    org_id: OrgId
    api_key_id: str
    scopes: frozenset[str]


_request_id: ContextVar[str] = ContextVar("request_id")
_principal: ContextVar[Principal] = ContextVar("principal")
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)

# Kept back from the caller's deadline, so that our own answer still arrives in time.
_SHAVED_SECONDS = 0.02


def bind_call(request_id: str, seconds_left: float | None) -> None:
    """Remember the call's id and deadline; `seconds_left` is None where the caller set none."""
    _request_id.set(request_id)
    _deadline.set(None if seconds_left is None else time.monotonic() + seconds_left)


def bind_principal(principal: Principal) -> None:
    """Remember who is calling."""
    _principal.set(principal)


def current_request_id() -> str:
    """The id of the request that is served; a new one in background work."""
    return _request_id.get(None) or uuid4().hex


def current_principal() -> Principal:
    """Who is calling.

    Raises:
        Internal: The method is one that needs no API key, so there is nobody.
    """
    principal = _principal.get(None)
    if principal is None:
        raise Internal("this method has no principal")
    return principal


def remaining_seconds(at_most: float) -> float:
    """The time that a call to somebody else may take: what our caller left, up to a bound."""
    deadline = _deadline.get()
    if deadline is None:
        return at_most
    return max(0.001, min(at_most, deadline - time.monotonic() - _SHAVED_SECONDS))
