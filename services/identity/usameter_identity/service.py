"""What identity does: tells who is calling, and keeps keys, tenants and organizations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from usameter_core.api_key import hash_api_key, new_api_key
from usameter_core.errors import FieldViolation, InvalidArgument, NotFound, Unauthenticated
from usameter_core.grpc.context import Principal
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_identity.domain.scopes import grant_scopes
from usameter_identity.domain.values import (
    API_KEY_ID_PREFIX,
    NAME_CHARACTERS_MAX,
    PREFIX_CHARACTERS,
    ApiKey,
    ApiKeyId,
    Organization,
    Tenant,
    is_name,
    is_tenant_id,
)
from usameter_identity.store import IdentityStore

_NAME_RULE = f"must be 1 to {NAME_CHARACTERS_MAX} printable characters"


@dataclass(frozen=True, slots=True)
class IssuedApiKey:
    """A new key and its secret, which exists here and, from the answer on, with its holder."""

    api_key: ApiKey
    secret: str


class IdentityService:
    """The use cases. Also the `Authenticator` of identity's own calls: it asks its store, and caches nothing."""

    def __init__(self, *, store: IdentityStore) -> None:
        self._store = store

    async def authenticate(self, key_sha256: bytes) -> Principal:
        """The holder of the key with that hash.

        Raises:
            Unauthenticated: There is none, or the key was revoked.
        """
        principal = await self._store.find_principal(key_sha256)
        if principal is None:
            raise Unauthenticated()
        return principal

    async def create_api_key(self, maker: Principal, *, name: str, scopes: Sequence[str]) -> IssuedApiKey:
        """Make a key of the maker's organization; see `grant_scopes` for what it may do."""
        return await self.issue_api_key(maker.org_id, name=name, scopes=grant_scopes(scopes, held=maker.scopes))

    async def issue_api_key(self, org_id: OrgId, *, name: str, scopes: frozenset[str]) -> IssuedApiKey:
        """Make a key with exactly these scopes, on the operator's authority. A repeat makes another."""
        _require_name(name, field="name")
        secret = new_api_key()
        api_key = await self._store.insert_api_key(
            org_id,
            ApiKeyId(new_uuid()),
            name=name,
            prefix=secret[:PREFIX_CHARACTERS],
            key_sha256=hash_api_key(secret),
            scopes=scopes,
        )
        return IssuedApiKey(api_key, secret)

    async def get_api_key(self, org_id: OrgId, api_key_id: ApiKeyId) -> ApiKey:
        """The organization's key, revoked or not; else NotFound."""
        return _found(await self._store.find_api_key(org_id, api_key_id), api_key_id)

    async def list_api_keys(self, org_id: OrgId, *, after: UUID | None, limit: int) -> list[ApiKey]:
        """Up to `limit` keys with ids above `after`, oldest first."""
        return await self._store.list_api_keys(org_id, after=after, limit=limit)

    async def revoke_api_key(self, org_id: OrgId, api_key_id: ApiKeyId) -> ApiKey:
        """Revoke the organization's key; else NotFound. Idempotent. A key may revoke itself."""
        return _found(await self._store.revoke_api_key(org_id, api_key_id), api_key_id)

    async def get_organization(self, org_id: OrgId) -> Organization:
        """The organization; else NotFound."""
        organization = await self._store.find_organization(org_id)
        if organization is None:
            raise NotFound("organization", str(org_id))
        return organization

    async def ensure_organization(self, name: str) -> Organization:
        """The organization of that name, made where it is missing. Two at once make one."""
        _require_name(name, field="organization")
        return await self._store.ensure_organization(name, org_id=OrgId(new_uuid()))

    async def get_tenant(self, org_id: OrgId, tenant_id: str) -> Tenant:
        """The organization's tenant; else NotFound."""
        tenant = await self._store.find_tenant(org_id, tenant_id) if is_tenant_id(tenant_id) else None
        if tenant is None:
            raise NotFound("tenant", tenant_id)
        return tenant

    async def list_tenants(self, org_id: OrgId, *, after: str | None, limit: int) -> list[Tenant]:
        """Up to `limit` tenants with ids above `after`, ascending by code point."""
        return await self._store.list_tenants(org_id, after=after, limit=limit)

    async def ensure_tenants(self, org_id: OrgId, tenant_ids: Sequence[str]) -> int:
        """Make the tenants that are missing; how many that were. All or none; idempotent.

        Raises:
            InvalidArgument: An id cannot be a tenant's; every such one is named.
            NotFound: There is no such organization.
        """
        violations = [
            FieldViolation(f"tenant_ids[{index}]", _NAME_RULE)
            for index, tenant_id in enumerate(tenant_ids)
            if not is_tenant_id(tenant_id)
        ]
        if violations:
            raise InvalidArgument(violations)
        return await self._store.ensure_tenants(org_id, sorted(set(tenant_ids)))


def _require_name(name: str, *, field: str) -> None:
    if not is_name(name):
        raise InvalidArgument([FieldViolation(field, _NAME_RULE)])


def _found(api_key: ApiKey | None, api_key_id: ApiKeyId) -> ApiKey:
    if api_key is None:
        raise NotFound("api_key", format_id(API_KEY_ID_PREFIX, api_key_id))
    return api_key
