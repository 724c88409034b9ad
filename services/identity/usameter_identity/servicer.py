"""Identity's protos ↔ domain, and nothing else."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from usameter.identity.v1 import (
    api_key_pb2,
    api_key_pb2_grpc,
    authentication_pb2,
    authentication_pb2_grpc,
    organization_pb2,
    organization_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
)
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.grpc.context import current_principal
from usameter_core.ids import OrgId, format_id, parse_id
from usameter_core.pages import DEFAULT_LIMIT, decode_page_token, encode_page_token
from usameter_identity.domain.values import (
    API_KEY_ID_PREFIX,
    ApiKey,
    ApiKeyId,
    Organization,
    Tenant,
    is_tenant_id,
)
from usameter_identity.service import IdentityService


class AuthenticationServicer(authentication_pb2_grpc.AuthenticationServiceServicer):
    """Tells the other services who is calling."""

    def __init__(self, service: IdentityService) -> None:
        self._service = service

    async def Authenticate(
        self, request: authentication_pb2.AuthenticateRequest, context: Any
    ) -> authentication_pb2.AuthenticateResponse:
        """The holder of a key."""
        principal = await self._service.authenticate(request.key_sha256)
        return authentication_pb2.AuthenticateResponse(
            org_id=str(principal.org_id),
            api_key_id=principal.api_key_id,
            scopes=sorted(principal.scopes),
        )


class ApiKeyServicer(api_key_pb2_grpc.ApiKeyServiceServicer):
    """API keys of the calling organization."""

    def __init__(self, service: IdentityService) -> None:
        self._service = service

    async def CreateApiKey(
        self, request: api_key_pb2.CreateApiKeyRequest, context: Any
    ) -> api_key_pb2.CreateApiKeyResponse:
        """Makes a key; its secret is in this answer and nowhere else."""
        issued = await self._service.create_api_key(current_principal(), name=request.name, scopes=request.scopes)
        return api_key_pb2.CreateApiKeyResponse(api_key=api_key_to_proto(issued.api_key), secret=issued.secret)

    async def ListApiKeys(
        self, request: api_key_pb2.ListApiKeysRequest, context: Any
    ) -> api_key_pb2.ListApiKeysResponse:
        """A page of keys, oldest first."""
        limit = request.limit or DEFAULT_LIMIT
        key = decode_page_token(request.page_token, tuple[UUID])
        # One more than the page holds tells whether there is another page.
        api_keys = await self._service.list_api_keys(
            current_principal().org_id, after=key[0] if key else None, limit=limit + 1
        )
        page = api_keys[:limit]
        return api_key_pb2.ListApiKeysResponse(
            api_keys=[api_key_to_proto(each) for each in page],
            next_page_token=encode_page_token([str(page[-1].api_key_id)]) if len(api_keys) > limit else None,
        )

    async def GetApiKey(self, request: api_key_pb2.GetApiKeyRequest, context: Any) -> api_key_pb2.ApiKey:
        """One key."""
        api_key_id = api_key_id_from_proto(request.api_key_id)
        return api_key_to_proto(await self._service.get_api_key(current_principal().org_id, api_key_id))

    async def RevokeApiKey(self, request: api_key_pb2.RevokeApiKeyRequest, context: Any) -> api_key_pb2.ApiKey:
        """Revokes a key, for good."""
        api_key_id = api_key_id_from_proto(request.api_key_id)
        return api_key_to_proto(await self._service.revoke_api_key(current_principal().org_id, api_key_id))


class TenantServicer(tenant_pb2_grpc.TenantServiceServicer):
    """Customers of the calling organization."""

    def __init__(self, service: IdentityService) -> None:
        self._service = service

    async def ListTenants(self, request: tenant_pb2.ListTenantsRequest, context: Any) -> tenant_pb2.ListTenantsResponse:
        """A page of tenants, by id."""
        limit = request.limit or DEFAULT_LIMIT
        tenants = await self._service.list_tenants(
            current_principal().org_id, after=tenant_page_from_proto(request.page_token), limit=limit + 1
        )
        page = tenants[:limit]
        return tenant_pb2.ListTenantsResponse(
            tenants=[tenant_to_proto(each) for each in page],
            next_page_token=encode_page_token([page[-1].tenant_id]) if len(tenants) > limit else None,
        )

    async def GetTenant(self, request: tenant_pb2.GetTenantRequest, context: Any) -> tenant_pb2.Tenant:
        """One tenant."""
        return tenant_to_proto(await self._service.get_tenant(current_principal().org_id, request.tenant_id))

    async def EnsureTenants(
        self, request: tenant_pb2.EnsureTenantsRequest, context: Any
    ) -> tenant_pb2.EnsureTenantsResponse:
        """Makes the tenants that are missing."""
        org_id = org_id_from_proto(request.org_id)
        return tenant_pb2.EnsureTenantsResponse(created=await self._service.ensure_tenants(org_id, request.tenant_ids))


class OrganizationServicer(organization_pb2_grpc.OrganizationServiceServicer):
    """The calling organization; any, for the other services."""

    def __init__(self, service: IdentityService) -> None:
        self._service = service

    async def GetOrganization(
        self, request: organization_pb2.GetOrganizationRequest, context: Any
    ) -> organization_pb2.Organization:
        """The organization of the calling key."""
        return organization_to_proto(await self._service.get_organization(current_principal().org_id))

    async def ReadOrganization(
        self, request: organization_pb2.ReadOrganizationRequest, context: Any
    ) -> organization_pb2.Organization:
        """The organization of that id."""
        return organization_to_proto(await self._service.get_organization(org_id_from_proto(request.org_id)))


def api_key_id_from_proto(text: str) -> ApiKeyId:
    """Raises InvalidArgument where the text is no key's id."""
    return ApiKeyId(parse_id(API_KEY_ID_PREFIX, text, field="api_key_id"))


def org_id_from_proto(text: str) -> OrgId:
    """Raises InvalidArgument where the text is no UUID."""
    try:
        return OrgId(UUID(text))
    except ValueError:
        raise InvalidArgument([FieldViolation("org_id", "must be a UUID")]) from None


def tenant_page_from_proto(token: str) -> str | None:
    """The tenant after which a page begins; raises InvalidArgument where the token is not ours."""
    key = decode_page_token(token, tuple[str])
    if key is None:
        return None
    if not is_tenant_id(key[0]):
        raise InvalidArgument([FieldViolation("page_token", "is not a token that this list returned")])
    return key[0]


def api_key_to_proto(api_key: ApiKey) -> api_key_pb2.ApiKey:
    """A key as the contract has it."""
    return api_key_pb2.ApiKey(
        id=format_id(API_KEY_ID_PREFIX, api_key.api_key_id),
        name=api_key.name,
        prefix=api_key.prefix,
        scopes=sorted(api_key.scopes),
        created_at=_timestamp(api_key.created_at),
        revoked_at=None if api_key.revoked_at is None else _timestamp(api_key.revoked_at),
    )


def organization_to_proto(organization: Organization) -> organization_pb2.Organization:
    """An organization as the contract has it."""
    return organization_pb2.Organization(
        id=str(organization.org_id),
        name=organization.name,
        created_at=_timestamp(organization.created_at),
    )


def tenant_to_proto(tenant: Tenant) -> tenant_pb2.Tenant:
    """A tenant as the contract has it."""
    return tenant_pb2.Tenant(tenant_id=tenant.tenant_id, created_at=_timestamp(tenant.created_at))


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message
