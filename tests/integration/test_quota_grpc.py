"""The quota service over sockets, as its own server assembles it; only who holds a key is made up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from pydantic import SecretStr

from usameter.common.v1 import error_pb2
from usameter.quota.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    quota_event_pb2,
    quota_event_pb2_grpc,
    quota_pb2,
    quota_pb2_grpc,
)
from usameter_core.api_key import hash_api_key, new_api_key
from usameter_core.clock import SystemClock
from usameter_core.config import Address
from usameter_core.errors import Unauthenticated
from usameter_core.grpc.channels import open_channel
from usameter_core.grpc.context import Principal
from usameter_core.ids import OrgId
from usameter_core.postgres.migrate import migrate
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_devstack.valkey import EmbeddedValkey
from usameter_quota.config import QuotaSettings
from usameter_quota.server import open_quota

INTERNAL_TOKEN = "internal-token-of-this-test-session"
ALL_SCOPES = frozenset({"quotas:read", "quotas:write"})


class KnownKeys:
    """An authenticator that knows the keys it was given."""

    def __init__(self) -> None:
        self.holders: dict[bytes, Principal] = {}

    def issue(self, *scopes: str) -> tuple[str, OrgId]:
        key, org_id = new_api_key(), OrgId(uuid4())
        self.holders[hash_api_key(key)] = Principal(org_id, "key_test", frozenset(scopes))
        return key, org_id

    async def authenticate(self, key_sha256: bytes) -> Principal:
        principal = self.holders.get(key_sha256)
        if principal is None:
            raise Unauthenticated()
        return principal


@dataclass(frozen=True, slots=True)
class Running:
    """The service, and an organization with a key of all scopes."""

    channel: grpc.aio.Channel
    keys: KnownKeys
    api_key: str
    org_id: str

    @property
    def quotas(self) -> Any:
        return quota_pb2_grpc.QuotaServiceStub(self.channel)

    @property
    def admissions(self) -> Any:
        return admission_pb2_grpc.AdmissionServiceStub(self.channel)

    @property
    def events(self) -> Any:
        return quota_event_pb2_grpc.QuotaEventServiceStub(self.channel)

    @property
    def key(self) -> tuple[tuple[str, str], ...]:
        return bearer(self.api_key)

    async def set(self, limit_value: str = "10", tenant_id: str = "t", event_type: str = "e", **more: Any) -> Any:
        terms: dict[str, Any] = {"enforcement_mode": quota_pb2.HARD, "period": quota_pb2.MONTHLY, **more}
        request = quota_pb2.SetQuotaRequest(
            tenant_id=tenant_id, event_type=event_type, limit_value=limit_value, **terms
        )
        return await self.quotas.SetQuota(request, metadata=self.key)

    async def reserve(self, *quantities: str, reservation_id: str | None = None) -> Any:
        request = admission_pb2.ReserveRequest(org_id=self.org_id, reservation_id=reservation_id or str(uuid4()))
        for quantity in quantities:
            item = request.requests.add().items.add(tenant_id="t", event_type="e", quantity=quantity)
            item.timestamp.FromDatetime(datetime.now(UTC))
        return await self.admissions.Reserve(request, metadata=bearer(INTERNAL_TOKEN))

    async def use(self, *quantities: str) -> None:
        """Reserve and commit."""
        reservation_id = str(uuid4())
        await self.reserve(*quantities, reservation_id=reservation_id)
        settlement = admission_pb2.Settlement(
            org_id=self.org_id, reservation_id=reservation_id, outcome=admission_pb2.OUTCOME_COMMITTED
        )
        await self.admissions.Settle(
            admission_pb2.SettleRequest(settlements=[settlement]), metadata=bearer(INTERNAL_TOKEN)
        )


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def details_of(error: grpc.aio.AioRpcError, message: Any) -> Any:
    """The typed details that an error carries."""
    raw = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    assert isinstance(raw, bytes)
    assert any(packed.Unpack(message) for packed in Status.FromString(raw).details)
    return message


@pytest.fixture(scope="module")
async def service(
    postgres: EmbeddedPostgres, valkey: EmbeddedValkey
) -> AsyncIterator[tuple[grpc.aio.Channel, KnownKeys]]:
    """One service for all tests here: each has an organization of its own."""
    await postgres.ensure_database("quota_grpc")
    await migrate(postgres.url("quota_grpc"), schema="quota", package="usameter_quota")
    settings = QuotaSettings(
        listen=Address("127.0.0.1", 0),
        internal_token=SecretStr(INTERNAL_TOKEN),
        database_url=SecretStr(postgres.url("quota_grpc", user="usameter_quota")),
        redis_url=SecretStr(valkey.url()),
        identity_addr=Address("127.0.0.1", 1),
        drain_seconds=0,
    )
    keys = KnownKeys()
    async with (
        open_quota(settings, clock=SystemClock(), authenticator=keys) as address,
        open_channel(address) as channel,
    ):
        yield channel, keys


@pytest.fixture
def running(service: tuple[grpc.aio.Channel, KnownKeys]) -> Running:
    channel, keys = service
    api_key, org_id = keys.issue(*ALL_SCOPES)
    return Running(channel, keys, api_key, str(org_id))


async def test_a_quota_reads_back_as_it_was_set_with_its_use(running: Running) -> None:
    answered = await running.set("10.50", soft_limit_percent=90)
    assert (answered.limit_value, answered.soft_limit_percent, answered.current) == ("10.5", 90, "0")
    await running.reserve("2.25", "0.25")
    quota = await running.quotas.GetQuota(
        quota_pb2.GetQuotaRequest(tenant_id="t", event_type="e"), metadata=running.key
    )
    assert (quota.current, quota.remaining) == ("2.5", "8")
    assert (quota.enforcement_mode, quota.period) == (quota_pb2.HARD, quota_pb2.MONTHLY)
    assert quota.reset_at.ToDatetime(UTC).day == 1
    assert quota.updated_at == answered.updated_at


async def test_verdicts_come_in_request_order_with_canonical_decimals(running: Running) -> None:
    await running.set("10")
    answer = await running.reserve("7", "2.50", "1")
    assert [verdict.admitted for verdict in answer.verdicts] == [True, True, False]
    (warning,) = answer.verdicts[1].warnings
    assert (warning.code, warning.status.current, warning.status.requested) == ("QUOTA_SOFT_LIMIT", "7", "2.5")
    (violation,) = answer.verdicts[2].violations
    assert (violation.limit, violation.current, violation.requested) == ("10", "9.5", "1")
    assert violation.HasField("reset_at")


async def test_settling_and_adjusting_change_what_is_counted(running: Running) -> None:
    await running.set("10")
    reservation_id = str(uuid4())
    await running.reserve("4", reservation_id=reservation_id)
    await running.reserve("3")
    settlement = admission_pb2.Settlement(
        org_id=running.org_id, reservation_id=reservation_id, outcome=admission_pb2.OUTCOME_ABORTED
    )
    metadata = bearer(INTERNAL_TOKEN)
    open_before = await running.admissions.ListOpenReservations(
        admission_pb2.ListOpenReservationsRequest(limit=1000), metadata=metadata
    )
    assert reservation_id in [each.reservation_id for each in open_before.reservations]
    await running.admissions.Settle(admission_pb2.SettleRequest(settlements=[settlement]), metadata=metadata)
    adjustment = admission_pb2.Adjustment(
        org_id=running.org_id, adjustment_id=str(uuid4()), tenant_id="t", event_type="e", quantity="-0.5"
    )
    adjustment.timestamp.FromDatetime(datetime.now(UTC))
    await running.admissions.Adjust(admission_pb2.AdjustRequest(adjustments=[adjustment]), metadata=metadata)
    assert (await running.set("10")).current == "2.5"
    settlement.outcome = admission_pb2.OUTCOME_COMMITTED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.admissions.Settle(admission_pb2.SettleRequest(settlements=[settlement]), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details_of(caught.value, error_pb2.PreconditionDetails()).condition == "RESERVATION_CONTRADICTED"


async def test_quotas_are_listed_page_by_page_in_key_order(running: Running) -> None:
    for tenant_id, event_type in [("b", "y"), ("a", "z"), ("b", "x"), ("a", "y"), ("c", "x")]:
        await running.set(tenant_id=tenant_id, event_type=event_type)
    found: list[tuple[str, str]] = []
    request = quota_pb2.ListQuotasRequest(limit=2)
    while True:
        page = await running.quotas.ListQuotas(request, metadata=running.key)
        assert len(page.quotas) <= 2
        found += [(quota.tenant_id, quota.event_type) for quota in page.quotas]
        if not page.HasField("next_page_token"):
            break
        request.page_token = page.next_page_token
    assert found == [("a", "y"), ("a", "z"), ("b", "x"), ("b", "y"), ("c", "x")]
    of_b = await running.quotas.ListQuotas(quota_pb2.ListQuotasRequest(tenant_id="b"), metadata=running.key)
    assert [quota.event_type for quota in of_b.quotas] == ["x", "y"]


async def test_checking_reserves_nothing_and_needs_no_limit(running: Running) -> None:
    request = quota_pb2.CheckQuotaRequest(tenant_id="t", event_type="e", quantity="11")
    free = await running.quotas.CheckQuota(request, metadata=running.key)
    assert free.allowed
    assert not free.HasField("quota")
    await running.set("10")
    refused = await running.quotas.CheckQuota(request, metadata=running.key)
    assert not refused.allowed
    assert refused.quota.current == "0"
    request.quantity = "10"
    assert (await running.quotas.CheckQuota(request, metadata=running.key)).allowed
    request.quantity = "0"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.quotas.CheckQuota(request, metadata=running.key)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_quota_that_is_not_there_is_not_found(running: Running) -> None:
    request = quota_pb2.DeleteQuotaRequest(tenant_id="t", event_type="e")
    await running.set()
    await running.quotas.DeleteQuota(request, metadata=running.key)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.quotas.DeleteQuota(request, metadata=running.key)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details_of(caught.value, error_pb2.ResourceDetails()).id == "t/e"


async def test_terms_that_cannot_be_are_invalid(running: Running) -> None:
    faults: list[dict[str, Any]] = [
        {"limit_value": "1.0000001"},
        {"limit_value": "-1"},
        {"limit_value": "100000000000000"},
        {"enforcement_mode": 0},
        {"period": 0},
        {"soft_limit_percent": 0},
        {"soft_limit_percent": 101},
        {"grace_period_hours": 0, "enforcement_mode": quota_pb2.SOFT},
        {"grace_period_hours": 745, "enforcement_mode": quota_pb2.SOFT},
        {"tenant_id": ""},
        {"tenant_id": "nul\x00"},
        {"event_type": "a b"},
    ]
    for fault in faults:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.set(**fault)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, fault
        assert details_of(caught.value, ErrorInfo()).reason == "INVALID_ARGUMENT"


@pytest.mark.parametrize("mode", [quota_pb2.HARD, quota_pb2.DISABLED])
async def test_a_grace_period_is_for_soft_limits_only(running: Running, mode: Any) -> None:
    default = quota_pb2.SetQuotaDefaultRequest(
        event_type="e", limit_value="1", enforcement_mode=mode, period=quota_pb2.DAILY, grace_period_hours=24
    )
    for refused in (
        running.set(enforcement_mode=mode, grace_period_hours=24),
        running.quotas.SetQuotaDefault(default, metadata=running.key),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused
        (violation,) = details_of(caught.value, error_pb2.ViolationDetails()).violations
        assert violation.field == "grace_period_hours"
        assert quota_pb2.EnforcementMode.Name(mode) in violation.description
    default.enforcement_mode = quota_pb2.SOFT
    assert (await running.quotas.SetQuotaDefault(default, metadata=running.key)).grace_period_hours == 24
    assert not (await running.set(enforcement_mode=quota_pb2.SOFT)).HasField("grace_period_hours")


async def test_a_default_is_set_read_listed_and_deleted(running: Running) -> None:
    for event_type, limit_value in (("e", "2.50"), ("a", "1"), ("z", "3")):
        answered = await running.quotas.SetQuotaDefault(
            quota_pb2.SetQuotaDefaultRequest(
                event_type=event_type, limit_value=limit_value, enforcement_mode=quota_pb2.HARD, period=quota_pb2.DAILY
            ),
            metadata=running.key,
        )
        assert answered.soft_limit_percent == 80
    request = quota_pb2.GetQuotaDefaultRequest(event_type="e")
    default = await running.quotas.GetQuotaDefault(request, metadata=running.key)
    assert (default.event_type, default.limit_value, default.HasField("grace_period_hours")) == ("e", "2.5", False)
    page = await running.quotas.ListQuotaDefaults(quota_pb2.ListQuotaDefaultsRequest(limit=2), metadata=running.key)
    rest = await running.quotas.ListQuotaDefaults(
        quota_pb2.ListQuotaDefaultsRequest(page_token=page.next_page_token), metadata=running.key
    )
    assert [each.event_type for each in (*page.quota_defaults, *rest.quota_defaults)] == ["a", "e", "z"]
    assert not rest.HasField("next_page_token")
    status = await running.quotas.GetQuota(
        quota_pb2.GetQuotaRequest(tenant_id="anybody", event_type="e"), metadata=running.key
    )
    assert (status.from_default, status.limit_value, status.current, status.reserved) == (True, "2.5", "0", "0")
    await running.quotas.DeleteQuotaDefault(quota_pb2.DeleteQuotaDefaultRequest(event_type="e"), metadata=running.key)
    for call in (
        running.quotas.GetQuotaDefault(request, metadata=running.key),
        running.quotas.DeleteQuotaDefault(quota_pb2.DeleteQuotaDefaultRequest(event_type="e"), metadata=running.key),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_quota_events_are_listed_newest_first_and_by_what_is_asked_for(running: Running) -> None:
    await running.set("10", enforcement_mode=quota_pb2.SOFT, grace_period_hours=1)
    await running.use("8")
    await running.use("2")
    await running.use("0.5")
    types = quota_event_pb2.QuotaEventType
    request = quota_event_pb2.ListQuotaEventsRequest(limit=2)
    newest = await running.events.ListQuotaEvents(request, metadata=running.key)
    request.page_token = newest.next_page_token
    oldest = await running.events.ListQuotaEvents(request, metadata=running.key)
    assert not oldest.HasField("next_page_token")
    assert [
        (each.position, types.Name(each.type), each.stored) for each in (*newest.quota_events, *oldest.quota_events)
    ] == [
        (3, "GRACE_STARTED", "10.5"),
        (2, "LIMIT_REACHED", "10"),
        (1, "SOFT_LIMIT_REACHED", "8"),
    ]
    assert [each.HasField("grace_ends_at") for each in newest.quota_events] == [True, False]
    for filters, positions in (
        ({"tenant_id": "t", "event_type": "e", "type": types.LIMIT_REACHED}, [2]),
        ({"tenant_id": "u"}, []),
        ({"event_type": "other"}, []),
        ({"type": types.RESET}, []),
    ):
        found = await running.events.ListQuotaEvents(
            quota_event_pb2.ListQuotaEventsRequest(**filters), metadata=running.key
        )
        assert [each.position for each in found.quota_events] == positions


async def test_a_stream_of_quota_events_goes_on_where_it_was_left(running: Running) -> None:
    await running.set("10")
    stream = running.events.WatchQuotaEvents(quota_event_pb2.WatchQuotaEventsRequest(), metadata=running.key)
    await running.use("8")
    first = await stream.read()
    assert (first.position, first.tenant_id, first.limit_value) == (1, "t", "10")
    stream.cancel()
    await running.use("2")
    again = running.events.WatchQuotaEvents(
        quota_event_pb2.WatchQuotaEventsRequest(after_position=first.position), metadata=running.key
    )
    assert (await again.read()).position == 2
    again.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.events.WatchQuotaEvents(quota_event_pb2.WatchQuotaEventsRequest()).read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_each_method_asks_for_its_own_credentials(running: Running) -> None:
    reader, _ = running.keys.issue("quotas:read")
    request = quota_pb2.DeleteQuotaRequest(tenant_id="t", event_type="e")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.quotas.DeleteQuota(request, metadata=bearer(reader))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.admissions.Settle(
            admission_pb2.SettleRequest(settlements=[admission_pb2.Settlement(outcome=admission_pb2.OUTCOME_ABORTED)]),
            metadata=running.key,
        )
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
