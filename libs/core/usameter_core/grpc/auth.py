"""Who may call what: the `access` option of each method, enforced.

A method names a scope (an API key of an organization must carry it), or is for other services of
the deployment, or for the operator's scheduler, or checks a key for each item of its request. A
method without the option is refused at start-up.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from contextvars import Context
from typing import Protocol
from uuid import UUID

import grpc
from google.protobuf.descriptor import MethodDescriptor

from usameter.common.v1 import options_pb2
from usameter.identity.v1 import authentication_pb2, authentication_pb2_grpc
from usameter_core.api_key import hash_api_key, is_well_formed
from usameter_core.errors import PermissionDenied, Unauthenticated
from usameter_core.grpc.channels import service_metadata
from usameter_core.grpc.context import Principal, bind_principal
from usameter_core.grpc.status import peer_errors
from usameter_core.ids import OrgId
from usameter_core.ratelimit.limiter import RateLimiter
from usameter_core.ratelimit.standing import Standing

# A revoked key is refused everywhere after this long.
PRINCIPAL_CACHE_SECONDS = 5.0
_CACHED_PRINCIPALS_MAX = 10_000
_ASK_SECONDS_MAX = 5.0


class Authenticator(Protocol):
    """Knows the holders of API keys."""

    async def authenticate(self, key_sha256: bytes) -> Principal:
        """The holder of the key.

        Raises:
            Unauthenticated: There is none.
        """
        ...


class IdentityAuthenticator:
    """Asks the identity service, and remembers its answers for `PRINCIPAL_CACHE_SECONDS`.

    Refusals are not remembered: a key works from the moment it is made.
    """

    def __init__(self, channel: grpc.aio.Channel, *, internal_token: str) -> None:
        self._stub = authentication_pb2_grpc.AuthenticationServiceStub(channel)
        self._internal_token = internal_token
        self._cache: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Principal]] = {}

    async def authenticate(self, key_sha256: bytes) -> Principal:
        """See `Authenticator`. Calls that ask for one key at once share one question."""
        cached = self._cache.get(key_sha256)
        if cached is not None and cached[0] > time.monotonic():
            return cached[1]
        task = self._asking.get(key_sha256)
        if task is None:
            # In a context of its own: in the first caller's, all who share the question would fail at
            # that one's deadline.
            task = asyncio.create_task(self._ask(key_sha256), context=Context())
            self._asking[key_sha256] = task
            task.add_done_callback(lambda _: self._asking.pop(key_sha256, None))
        return await asyncio.shield(task)

    async def _ask(self, key_sha256: bytes) -> Principal:
        with peer_errors("identity"):
            answer = await self._stub.Authenticate(
                authentication_pb2.AuthenticateRequest(key_sha256=key_sha256),
                metadata=service_metadata(self._internal_token),
                timeout=_ASK_SECONDS_MAX,
            )
        principal = Principal(OrgId(UUID(answer.org_id)), answer.api_key_id, frozenset(answer.scopes))
        self._cache[key_sha256] = (time.monotonic() + PRINCIPAL_CACHE_SECONDS, principal)
        self._cache.move_to_end(key_sha256)
        if len(self._cache) > _CACHED_PRINCIPALS_MAX:
            self._cache.popitem(last=False)
        return principal


class AccessControl:
    """Decides for each call whether its bearer token satisfies the method's `access`, and counts those of API keys."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        limiter: RateLimiter,
        internal_token: str,
        cron_secret: str | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._limiter = limiter
        self._internal_token = internal_token.encode()
        self._cron_secret = None if cron_secret is None else cron_secret.encode()

    async def admit(self, access: options_pb2.Access, authorization: str) -> Standing | None:
        """Let the call pass, and bind its principal where it has one.

        Returns:
            How it fared with the rate limits of its key, which may have refused it; None where none binds it.

        Raises:
            Unauthenticated: The token is missing, unknown, revoked, or of the wrong kind.
            PermissionDenied: The key lacks the method's scope.
        """
        match access.WhichOneof("requirement"):
            case "scope":
                principal = await self.authenticate(authorization, access.scope)
                bind_principal(principal)
                if not access.unlimited:
                    (standing,) = await self.count(principal)
                    return standing
            case "service":
                if not hmac.compare_digest(_bearer_token(authorization).encode(), self._internal_token):
                    raise Unauthenticated()
            case "cron":
                token = _bearer_token(authorization).encode()
                if self._cron_secret is None or not hmac.compare_digest(token, self._cron_secret):
                    raise Unauthenticated()
            case "items":
                pass  # the method calls `authenticate` and `count` for each
            case _:
                raise Unauthenticated()
        return None

    async def count(self, principal: Principal, requests: int = 1) -> list[Standing | None]:
        """Count requests against the rate limits of their key; see `RateLimiter.count`."""
        return await self._limiter.count(principal, requests)

    async def authenticate(self, authorization: str, scope: str) -> Principal:
        """The holder of the API key in an Authorization header, who has the scope.

        Raises:
            Unauthenticated, PermissionDenied: As `admit`.
        """
        token = _bearer_token(authorization)
        if not is_well_formed(token):
            raise Unauthenticated()
        principal = await self._authenticator.authenticate(hash_api_key(token))
        if scope not in principal.scopes:
            raise PermissionDenied(scope)
        return principal


def _bearer_token(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated()
    return token


def access_of(method: MethodDescriptor) -> options_pb2.Access:
    """The method's `access` option.

    Raises:
        ValueError: The contract does not say who may call it.
    """
    access = method.GetOptions().Extensions[options_pb2.access]
    if access.WhichOneof("requirement") is None:
        raise ValueError(f"{method.full_name} does not state its access")
    return access
