"""The services as they are deployed, in one event loop, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import grpc.aio
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from pydantic import SecretStr

from tests.conftest import Database
from usameter.ingest.v1 import event_pb2_grpc, snapshot_pb2_grpc, usage_pb2_grpc
from usameter.quota.v1 import admission_pb2_grpc, quota_pb2_grpc
from usameter_billing.config import BillingSettings
from usameter_billing.server import open_billing
from usameter_core.clock import Clock
from usameter_core.config import Address
from usameter_core.grpc.auth import IdentityAuthenticator
from usameter_core.grpc.channels import open_channel
from usameter_core.ids import OrgId
from usameter_core.postgres.pool import open_pool
from usameter_identity.bootstrap import bootstrap
from usameter_identity.config import IdentitySettings
from usameter_identity.server import open_identity
from usameter_identity.service import IdentityService
from usameter_identity.store import IdentityStore
from usameter_ingest.config import IngestSettings
from usameter_ingest.server import open_ingest
from usameter_quota.config import QuotaSettings
from usameter_quota.server import open_quota

INTERNAL_TOKEN = "internal-token-of-this-test-session"
CRON_SECRET = "cron-secret-of-this-test-session"
ANY_PORT = Address("127.0.0.1", 0)


@dataclass(frozen=True, slots=True)
class Services:
    """Running services, and an organization with a key of all scopes."""

    org_id: OrgId
    api_key: str
    identity: Address
    quota_address: Address
    ingest_address: Address
    quota: grpc.aio.Channel
    ingest: grpc.aio.Channel

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What calls of the organization carry."""
        return (("authorization", f"Bearer {self.api_key}"),)

    @property
    def cron_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {CRON_SECRET}"),)

    @property
    def service_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {INTERNAL_TOKEN}"),)

    @property
    def events(self) -> Any:
        return event_pb2_grpc.EventServiceStub(self.ingest)

    @property
    def usage(self) -> Any:
        return usage_pb2_grpc.UsageServiceStub(self.ingest)

    @property
    def snapshots(self) -> Any:
        return snapshot_pb2_grpc.SnapshotServiceStub(self.ingest)

    @property
    def quotas(self) -> Any:
        return quota_pb2_grpc.QuotaServiceStub(self.quota)

    @property
    def admission(self) -> Any:
        return admission_pb2_grpc.AdmissionServiceStub(self.quota)


@asynccontextmanager
async def open_services(database: Database, *, clock: Clock, organization: str = "demo") -> AsyncIterator[Services]:
    """The services on a database of their own, each as its own role."""
    token = SecretStr(INTERNAL_TOKEN)
    async with AsyncExitStack() as opened:
        identity = await opened.enter_async_context(
            open_identity(
                IdentitySettings(
                    listen=ANY_PORT,
                    database_url=SecretStr(database.role_url("identity")),
                    redis_url=SecretStr(database.redis_url),
                    internal_token=token,
                )
            )
        )
        identity_channel = await opened.enter_async_context(open_channel(identity))
        quota = await opened.enter_async_context(_open_quota(database, identity, identity_channel, clock=clock))
        ingest = await opened.enter_async_context(open_ingest(_ingest_settings(database, identity, quota), clock=clock))
        org_id, api_key = await new_organization(database, organization)
        yield Services(
            org_id=org_id,
            api_key=api_key,
            identity=identity,
            quota_address=quota,
            ingest_address=ingest,
            quota=await opened.enter_async_context(open_channel(quota)),
            ingest=await opened.enter_async_context(open_channel(ingest)),
        )


@asynccontextmanager
async def open_replica(
    database: Database, services: Services, *, clock: Clock, seal_at: str | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    """A second ingest beside that of running services."""
    settings = _ingest_settings(database, services.identity, services.quota_address, seal_at=seal_at)
    async with open_ingest(settings, clock=clock) as address, open_channel(address) as channel:
        yield channel


@asynccontextmanager
async def open_quota_replica(database: Database, services: Services, *, clock: Clock) -> AsyncIterator[Address]:
    """A second quota beside that of running services."""
    async with (
        open_channel(services.identity) as identity_channel,
        _open_quota(database, services.identity, identity_channel, clock=clock) as address,
    ):
        yield address


@asynccontextmanager
async def open_billing_beside(
    database: Database, services: Services, *, clock: Clock
) -> AsyncIterator[grpc.aio.Channel]:
    """Billing, as its own role, with running services for peers."""
    settings = BillingSettings(
        listen=ANY_PORT,
        database_url=SecretStr(database.role_url("billing")),
        redis_url=SecretStr(database.redis_url),
        internal_token=SecretStr(INTERNAL_TOKEN),
        identity_addr=services.identity,
        ingest_addr=services.ingest_address,
    )
    async with open_billing(settings, clock=clock) as address, open_channel(address) as channel:
        yield channel


@asynccontextmanager
async def _open_quota(
    database: Database, identity: Address, identity_channel: grpc.aio.Channel, *, clock: Clock
) -> AsyncIterator[Address]:
    settings = QuotaSettings(
        listen=ANY_PORT,
        database_url=SecretStr(database.role_url("quota")),
        redis_url=SecretStr(database.redis_url),
        internal_token=SecretStr(INTERNAL_TOKEN),
        identity_addr=identity,
        # The receivers of tests are on loopback.
        webhook_allow_private=True,
    )
    authenticator = IdentityAuthenticator(identity_channel, internal_token=INTERNAL_TOKEN)
    async with open_quota(settings, clock=clock, authenticator=authenticator) as address:
        yield address


def _ingest_settings(
    database: Database, identity: Address, quota: Address, *, seal_at: str | None = None
) -> IngestSettings:
    return IngestSettings(
        listen=ANY_PORT,
        database_url=SecretStr(database.role_url("ingest")),
        internal_token=SecretStr(INTERNAL_TOKEN),
        identity_addr=identity,
        quota_addr=quota,
        redis_url=SecretStr(database.redis_url),
        cron_secret=SecretStr(CRON_SECRET),
        ingest_seal_at=seal_at,
    )


async def new_organization(database: Database, name: str) -> tuple[OrgId, str]:
    """An organization and a key of it with all scopes."""
    async with open_pool(database.role_url("identity"), application_name="test") as pool:
        made = await bootstrap(IdentityService(store=IdentityStore(pool)), organization=name, api_key="")
    return OrgId(UUID(made.org_id)), made.api_key


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason in an error's ErrorInfo."""
    info = ErrorInfo()
    assert _unpack(error, info), "the error carries no ErrorInfo"
    assert info.domain == "usameter"
    return info.reason


def details_of(error: grpc.aio.AioRpcError, message: Message) -> Any:
    """The typed details of an error."""
    assert _unpack(error, message), f"the error carries no {message.DESCRIPTOR.full_name}"
    return message


def _unpack(error: grpc.aio.AioRpcError, message: Message) -> bool:
    raw = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    assert isinstance(raw, bytes)
    return any(packed.Unpack(message) for packed in Status.FromString(raw).details)
