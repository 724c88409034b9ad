"""Identity over gRPC, on a real database: keys, tenants, organization, and who may call what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from pydantic import SecretStr

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
from usameter_core.api_key import hash_api_key, is_well_formed, new_api_key
from usameter_core.config import Address
from usameter_core.grpc.channels import open_channel
from usameter_core.postgres.pool import open_pool
from usameter_devstack.valkey import EmbeddedValkey
from usameter_identity.bootstrap import Bootstrapped, bootstrap
from usameter_identity.config import IdentitySettings
from usameter_identity.domain.scopes import ALL_SCOPES
from usameter_identity.server import open_identity
from usameter_identity.service import IdentityService
from usameter_identity.store import IdentityStore

INTERNAL_TOKEN = "internal-token-of-this-test-session"


@dataclass(frozen=True, slots=True)
class Identity:
    """A running service, and an organization in it."""

    channel: grpc.aio.Channel
    database_url: str
    org_id: str
    api_key: str

    @property
    def api_keys(self) -> Any:
        return api_key_pb2_grpc.ApiKeyServiceStub(self.channel)

    @property
    def tenants(self) -> Any:
        return tenant_pb2_grpc.TenantServiceStub(self.channel)

    @property
    def authentication(self) -> Any:
        return authentication_pb2_grpc.AuthenticationServiceStub(self.channel)

    @property
    def organizations(self) -> Any:
        return organization_pb2_grpc.OrganizationServiceStub(self.channel)

    async def authenticate(self, key: str) -> authentication_pb2.AuthenticateResponse:
        request = authentication_pb2.AuthenticateRequest(key_sha256=hash_api_key(key))
        answer: authentication_pb2.AuthenticateResponse = await self.authentication.Authenticate(
            request, metadata=bearer(INTERNAL_TOKEN)
        )
        return answer

    async def create_api_key(self, *scopes: str, maker: str | None = None) -> api_key_pb2.CreateApiKeyResponse:
        request = api_key_pb2.CreateApiKeyRequest(name="one more", scopes=scopes)
        answer: api_key_pb2.CreateApiKeyResponse = await self.api_keys.CreateApiKey(
            request, metadata=bearer(maker or self.api_key)
        )
        return answer

    async def ensure_tenants(self, *tenant_ids: str, org_id: str | None = None) -> int:
        request = tenant_pb2.EnsureTenantsRequest(org_id=org_id or self.org_id, tenant_ids=tenant_ids)
        answer = await self.tenants.EnsureTenants(request, metadata=bearer(INTERNAL_TOKEN))
        return int(answer.created)


@dataclass(frozen=True, slots=True)
class Running:
    channel: grpc.aio.Channel
    database_url: str


@pytest.fixture(scope="module")
async def running(template: Any, valkey: EmbeddedValkey) -> AsyncIterator[Running]:
    """One service for all these tests: each has an organization, and organizations see nothing of each other."""
    name = "identity_service"
    admin = await asyncpg.connect(template.url())
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE usameter_template STRATEGY file_copy")
    await admin.close()
    url = template.url(name, user="usameter_identity")
    settings = IdentitySettings(
        listen=Address("127.0.0.1", 0),
        internal_token=SecretStr(INTERNAL_TOKEN),
        database_url=SecretStr(url),
        redis_url=SecretStr(valkey.url()),
        drain_seconds=1,
    )
    async with open_identity(settings) as address, open_channel(address) as channel:
        yield Running(channel, url)


@pytest.fixture
async def identity(running: Running) -> Identity:
    first = await bootstrap_in(running.database_url, f"organization {uuid4()}")
    return Identity(running.channel, running.database_url, first.org_id, first.api_key)


async def bootstrap_in(database_url: str, organization: str) -> Bootstrapped:
    async with open_pool(database_url, application_name="test") as pool:
        return await bootstrap(IdentityService(store=IdentityStore(pool)), organization=organization, api_key="")


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    raw = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    assert isinstance(raw, bytes)
    info = ErrorInfo()
    Status.FromString(raw).details[0].Unpack(info)
    return info.reason


async def reason(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return reason_of(caught.value)


async def test_a_key_is_known_by_its_hash_with_its_organization_and_scopes(identity: Identity) -> None:
    answer = await identity.authenticate(identity.api_key)
    assert answer.org_id == identity.org_id
    assert answer.api_key_id.startswith("key_")
    assert set(answer.scopes) == ALL_SCOPES


async def test_an_unknown_key_is_unauthenticated(identity: Identity) -> None:
    assert await reason(identity.authenticate(new_api_key())) == "UNAUTHENTICATED"


async def test_only_services_may_ask_who_is_calling(identity: Identity) -> None:
    request = authentication_pb2.AuthenticateRequest(key_sha256=hash_api_key(identity.api_key))
    for metadata in ((), bearer("no-token-of-anybody"), bearer(identity.api_key)):
        call = identity.authentication.Authenticate(request, metadata=metadata)
        assert await reason(call) == "UNAUTHENTICATED"


async def test_a_new_key_is_shown_once_and_works_at_once(identity: Identity) -> None:
    made = await identity.create_api_key("events:write", "usage:read")
    assert is_well_formed(made.secret)
    assert made.secret.startswith(made.api_key.prefix)
    assert set((await identity.authenticate(made.secret)).scopes) == {"events:write", "usage:read"}
    read = await identity.api_keys.GetApiKey(
        api_key_pb2.GetApiKeyRequest(api_key_id=made.api_key.id), metadata=bearer(identity.api_key)
    )
    assert read == made.api_key
    assert not read.HasField("revoked_at")


async def test_the_database_holds_the_hash_of_a_key_and_not_the_key(identity: Identity) -> None:
    connection = await asyncpg.connect(identity.database_url)
    try:
        row = await connection.fetchrow(
            "SELECT key_sha256, api_key::text AS all FROM identity.api_key WHERE org_id = $1", UUID(identity.org_id)
        )
    finally:
        await connection.close()
    assert row is not None
    assert row["key_sha256"] == hash_api_key(identity.api_key)
    assert identity.api_key[12:] not in row["all"]


async def test_a_key_made_without_scopes_has_its_makers(identity: Identity) -> None:
    maker = await identity.create_api_key("api_keys:write", "usage:read")
    made = await identity.create_api_key(maker=maker.secret)
    assert set(made.api_key.scopes) == {"api_keys:write", "usage:read"}


async def test_nobody_grants_a_scope_they_lack(identity: Identity) -> None:
    maker = await identity.create_api_key("api_keys:write")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await identity.create_api_key("api_keys:write", "prices:write", maker=maker.secret)
    assert reason_of(caught.value) == "PERMISSION_DENIED"
    assert "prices:write" in (caught.value.details() or "")


async def test_a_method_refuses_a_key_without_its_scope(identity: Identity) -> None:
    made = await identity.create_api_key("usage:read")
    assert await reason(identity.create_api_key(maker=made.secret)) == "PERMISSION_DENIED"


async def test_a_revoked_key_is_refused_and_revoking_it_again_changes_nothing(identity: Identity) -> None:
    made = await identity.create_api_key("usage:read")
    request = api_key_pb2.RevokeApiKeyRequest(api_key_id=made.api_key.id)
    first = await identity.api_keys.RevokeApiKey(request, metadata=bearer(identity.api_key))
    again = await identity.api_keys.RevokeApiKey(request, metadata=bearer(identity.api_key))
    assert first.HasField("revoked_at")
    assert again == first
    assert await reason(identity.authenticate(made.secret)) == "UNAUTHENTICATED"


async def test_keys_are_listed_oldest_first_page_by_page(identity: Identity) -> None:
    for _ in range(4):
        await identity.create_api_key("usage:read")
    seen: list[str] = []
    pages: list[int] = []
    token = ""
    while True:
        page = await identity.api_keys.ListApiKeys(
            api_key_pb2.ListApiKeysRequest(limit=2, page_token=token), metadata=bearer(identity.api_key)
        )
        seen += [each.id for each in page.api_keys]
        pages.append(len(page.api_keys))
        if not page.HasField("next_page_token"):
            break
        token = page.next_page_token
    assert pages == [2, 2, 1]
    assert seen == sorted(set(seen))


async def test_another_organizations_key_is_not_found(identity: Identity) -> None:
    other = await bootstrap_in(identity.database_url, f"other {uuid4()}")
    made = await identity.create_api_key("usage:read")
    for call in (
        identity.api_keys.GetApiKey(
            api_key_pb2.GetApiKeyRequest(api_key_id=made.api_key.id), metadata=bearer(other.api_key)
        ),
        identity.api_keys.RevokeApiKey(
            api_key_pb2.RevokeApiKeyRequest(api_key_id=made.api_key.id), metadata=bearer(other.api_key)
        ),
    ):
        assert await reason(call) == "NOT_FOUND"
    assert (await identity.authenticate(made.secret)).org_id == identity.org_id


@pytest.mark.parametrize("name", ["", "a" * 101, "a\x00b"])
async def test_a_key_needs_a_printable_name(identity: Identity, name: str) -> None:
    call = identity.api_keys.CreateApiKey(api_key_pb2.CreateApiKeyRequest(name=name), metadata=bearer(identity.api_key))
    assert await reason(call) == "INVALID_ARGUMENT"


async def test_tenants_are_made_once_however_often_and_in_whatever_order(identity: Identity) -> None:
    assert await identity.ensure_tenants("b", "a", "b") == 2
    assert await identity.ensure_tenants("a", "c", "b") == 1
    assert await identity.ensure_tenants() == 0


async def test_calls_that_make_the_same_tenants_in_opposite_order_at_once_make_each_once(identity: Identity) -> None:
    names = [f"tenant_{number}" for number in range(500)]
    orders = [names, names[::-1]] * 4
    created = await asyncio.gather(*(identity.ensure_tenants(*order) for order in orders))
    assert sum(created) == len(names)


async def test_tenants_are_listed_by_code_point_page_by_page(identity: Identity) -> None:
    names = ["a", "B", "ä", "Z", "_", "1"]
    await identity.ensure_tenants(*names)
    seen: list[str] = []
    token = ""
    while True:
        page = await identity.tenants.ListTenants(
            tenant_pb2.ListTenantsRequest(limit=4, page_token=token), metadata=bearer(identity.api_key)
        )
        seen += [each.tenant_id for each in page.tenants]
        if not page.HasField("next_page_token"):
            break
        token = page.next_page_token
    assert seen == sorted(names)


async def test_a_tenant_is_of_its_organization_only(identity: Identity) -> None:
    await identity.ensure_tenants("acme")
    other = await bootstrap_in(identity.database_url, f"other {uuid4()}")
    request = tenant_pb2.GetTenantRequest(tenant_id="acme")
    assert (await identity.tenants.GetTenant(request, metadata=bearer(identity.api_key))).tenant_id == "acme"
    assert await reason(identity.tenants.GetTenant(request, metadata=bearer(other.api_key))) == "NOT_FOUND"


async def test_an_impossible_tenant_is_not_found_and_cannot_be_made(identity: Identity) -> None:
    request = tenant_pb2.GetTenantRequest(tenant_id="a\x01b")
    assert await reason(identity.tenants.GetTenant(request, metadata=bearer(identity.api_key))) == "NOT_FOUND"
    assert await reason(identity.ensure_tenants("good", "a\x01b")) == "INVALID_ARGUMENT"
    assert await identity.ensure_tenants("good") == 1


async def test_tenants_of_no_organization_are_not_made(identity: Identity) -> None:
    assert await reason(identity.ensure_tenants("a", org_id=str(uuid4()))) == "NOT_FOUND"
    assert await reason(identity.ensure_tenants("a", org_id="demo")) == "INVALID_ARGUMENT"


async def test_a_foreign_page_token_is_an_error(identity: Identity) -> None:
    calls = (
        identity.tenants.ListTenants(
            tenant_pb2.ListTenantsRequest(page_token="WyJhXHUwMDAwYiJd"), metadata=bearer(identity.api_key)
        ),
        identity.api_keys.ListApiKeys(
            api_key_pb2.ListApiKeysRequest(page_token="WyJhIl0"), metadata=bearer(identity.api_key)
        ),
    )
    for call in calls:
        assert await reason(call) == "INVALID_ARGUMENT"


async def test_a_key_reads_its_own_organization(identity: Identity) -> None:
    organization = await identity.organizations.GetOrganization(
        organization_pb2.GetOrganizationRequest(), metadata=bearer(identity.api_key)
    )
    assert organization.name.startswith("organization ")
    assert organization.id == identity.org_id


async def test_services_read_any_organization_and_keys_do_not(identity: Identity) -> None:
    async def read(org_id: str, token: str = INTERNAL_TOKEN) -> organization_pb2.Organization:
        request = organization_pb2.ReadOrganizationRequest(org_id=org_id)
        answer: organization_pb2.Organization = await identity.organizations.ReadOrganization(
            request, metadata=bearer(token)
        )
        return answer

    assert (await read(identity.org_id)).name.startswith("organization ")
    assert await reason(read(str(uuid4()))) == "NOT_FOUND"
    assert await reason(read("demo")) == "INVALID_ARGUMENT"
    assert await reason(read(identity.org_id, identity.api_key)) == "UNAUTHENTICATED"
