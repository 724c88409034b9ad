"""Billing as it is deployed, over real sockets, with stand-ins for the two services that it calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import grpc.aio
from pydantic import SecretStr

from tests.conftest import Database
from tests.support.clock import ManualClock
from usameter.billing.v1 import (
    credit_note_pb2,
    credit_note_pb2_grpc,
    credit_pb2,
    credit_pb2_grpc,
    invoice_pb2,
    invoice_pb2_grpc,
    plan_pb2,
    plan_pb2_grpc,
    price_pb2,
    price_pb2_grpc,
    report_pb2_grpc,
    settings_pb2,
    settings_pb2_grpc,
    subscription_pb2,
    subscription_pb2_grpc,
)
from usameter.common.v1 import job_pb2
from usameter.identity.v1 import (
    authentication_pb2,
    authentication_pb2_grpc,
    organization_pb2,
    organization_pb2_grpc,
)
from usameter.ingest.v1 import snapshot_pb2, snapshot_pb2_grpc
from usameter_billing.config import BillingSettings
from usameter_billing.server import open_billing
from usameter_core.api_key import hash_api_key, new_api_key
from usameter_core.config import Address
from usameter_core.grpc.channels import open_channel
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.period import Period, month_of

INTERNAL_TOKEN = "internal-token-of-this-test-session"
JANUARY = month_of(datetime(2026, 1, 5, tzinfo=UTC))
FEBRUARY = month_of(datetime(2026, 2, 5, tzinfo=UTC))
_SCOPES = ["audit:read", "prices:read", "prices:write", "invoices:read", "invoices:write"]

Use = tuple[str, str, str, str]  # tenant, event type, day, quantity


class StandInLedger(snapshot_pb2_grpc.SnapshotServiceServicer):
    """What ingest has sealed, and what it was told; pages are small so that epochs spread over them."""

    def __init__(self, page_snapshots: int | None = 3) -> None:
        self.epochs: dict[str, list[list[snapshot_pb2.Snapshot]]] = {}
        self.marks: dict[str, snapshot_pb2.SnapshotMark] = {}
        self.is_down = False
        self.refuses_marks = False
        self.refused_org_ids: set[str] = set()
        self.pages_left: int | None = None
        # Cleared: pages are asked for and do not come.
        self.is_open = asyncio.Event()
        self.is_open.set()
        self._page_snapshots = page_snapshots

    def seal(self, org_id: OrgId, *uses: Use) -> list[str]:
        """Seal an epoch with one snapshot per use; returns their ids in ledger order."""
        epochs = self.epochs.setdefault(str(org_id), [])
        epochs.append([_snapshot(len(epochs) + 1, use) for use in sorted(uses)])
        return [snapshot.id for snapshot in epochs[-1]]

    async def ListSnapshots(self, request: Any, context: Any) -> snapshot_pb2.ListSnapshotsResponse:
        await self.is_open.wait()
        if self.is_down or self.pages_left == 0:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "down")
        assert dict(context.invocation_metadata())["authorization"] == f"Bearer {INTERNAL_TOKEN}"
        self.pages_left = None if self.pages_left is None else self.pages_left - 1
        epochs = self.epochs.get(request.org_id, [])
        found = [snapshot for epoch in epochs[request.after_epoch :] for snapshot in epoch]
        start, count = int(request.page_token or 0), self._page_snapshots or request.limit
        return snapshot_pb2.ListSnapshotsResponse(
            snapshots=found[start : start + count],
            next_page_token=str(start + count) if start + count < len(found) else None,
            through_epoch=len(epochs),
        )

    async def MarkSnapshots(self, request: Any, context: Any) -> snapshot_pb2.MarkSnapshotsResponse:
        if self.is_down or self.refuses_marks:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "down")
        if request.org_id in self.refused_org_ids:
            await context.abort(grpc.StatusCode.INTERNAL, "a fault of ingest")
        for mark in request.marks:
            if mark.snapshot_id not in self.marks or self.marks[mark.snapshot_id].version < mark.version:
                self.marks[mark.snapshot_id] = mark
        return snapshot_pb2.MarkSnapshotsResponse()

    async def SealEpochs(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def GetSealJob(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


class StandInIdentity(
    authentication_pb2_grpc.AuthenticationServiceServicer, organization_pb2_grpc.OrganizationServiceServicer
):
    """Knows one key an organization, and one name of all of them."""

    def __init__(self) -> None:
        self.holders: dict[bytes, OrgId] = {}
        self.organization_name = "Demo Inc."

    def add_to(self, server: grpc.aio.Server) -> None:
        authentication_pb2_grpc.add_AuthenticationServiceServicer_to_server(self, server)
        organization_pb2_grpc.add_OrganizationServiceServicer_to_server(self, server)

    async def Authenticate(self, request: Any, context: Any) -> authentication_pb2.AuthenticateResponse:
        org_id = self.holders.get(request.key_sha256)
        if org_id is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown")
        return authentication_pb2.AuthenticateResponse(org_id=str(org_id), api_key_id="key_1", scopes=_SCOPES)

    async def ReadOrganization(self, request: Any, context: Any) -> organization_pb2.Organization:
        return organization_pb2.Organization(id=request.org_id, name=self.organization_name)

    async def GetOrganization(self, request: Any, context: Any) -> organization_pb2.Organization:
        raise NotImplementedError


@dataclass
class Organization:
    """Calls of one organization's key."""

    org_id: OrgId
    metadata: tuple[tuple[str, str], ...]
    ledger: StandInLedger
    channel: grpc.aio.Channel
    prices: Any = field(init=False)
    invoices: Any = field(init=False)
    credit_notes: Any = field(init=False)
    credits: Any = field(init=False)
    reports: Any = field(init=False)
    plans: Any = field(init=False)
    subscriptions: Any = field(init=False)
    settings: Any = field(init=False)

    def __post_init__(self) -> None:
        self.prices = price_pb2_grpc.PriceServiceStub(self.channel)
        self.invoices = invoice_pb2_grpc.InvoiceServiceStub(self.channel)
        self.credit_notes = credit_note_pb2_grpc.CreditNoteServiceStub(self.channel)
        self.credits = credit_pb2_grpc.CreditServiceStub(self.channel)
        self.reports = report_pb2_grpc.BillingReportServiceStub(self.channel)
        self.plans = plan_pb2_grpc.PlanServiceStub(self.channel)
        self.subscriptions = subscription_pb2_grpc.SubscriptionServiceStub(self.channel)
        self.settings = settings_pb2_grpc.BillingSettingsServiceStub(self.channel)

    def seal(self, *uses: Use) -> list[str]:
        return self.ledger.seal(self.org_id, *uses)

    async def set_price(
        self,
        event_type: str,
        unit_amount: str,
        *,
        currency: str = "USD",
        tenant_id: str | None = None,
        effective_from: datetime = datetime(2025, 1, 1, tzinfo=UTC),
    ) -> price_pb2.PriceVersion:
        price = price_pb2.Price(model=price_pb2.per_unit, currency=currency, unit_amount=unit_amount)
        return await self.set_terms(event_type, price, tenant_id=tenant_id, effective_from=effective_from)

    async def set_terms(
        self,
        event_type: str,
        price: price_pb2.Price,
        *,
        tenant_id: str | None = None,
        effective_from: datetime = datetime(2025, 1, 1, tzinfo=UTC),
    ) -> price_pb2.PriceVersion:
        request = price_pb2.CreatePriceRequest(
            event_type=event_type,
            tenant_id=tenant_id,
            effective_from=timestamp_from_datetime(effective_from),
            price=price,
        )
        version: price_pb2.PriceVersion = await self.prices.CreatePrice(request, metadata=self.metadata)
        return version

    async def set_plan(
        self,
        name: str = "Basic",
        base_fee: str = "31",
        *,
        currency: str = "USD",
        interval: plan_pb2.PlanInterval.ValueType = plan_pb2.MONTHLY,
        prices: dict[str, price_pb2.Price] | None = None,
    ) -> plan_pb2.Plan:
        request = plan_pb2.CreatePlanRequest(
            name=name,
            base_fee=base_fee,
            currency=currency,
            interval=interval,
            prices=[
                plan_pb2.PlanPrice(event_type=event_type, price=price) for event_type, price in (prices or {}).items()
            ],
        )
        plan: plan_pb2.Plan = await self.plans.CreatePlan(request, metadata=self.metadata)
        return plan

    async def subscribe(
        self, tenant_id: str, plan_id: str, start_at: datetime | None = None
    ) -> subscription_pb2.Subscription:
        request = subscription_pb2.CreateSubscriptionRequest(
            tenant_id=tenant_id, plan_id=plan_id, start_at=start_at and timestamp_from_datetime(start_at)
        )
        made: subscription_pb2.Subscription = await self.subscriptions.CreateSubscription(
            request, metadata=self.metadata
        )
        return made

    async def cancel(
        self, subscription_id: str, *, at: datetime | None = None, at_once: bool = False
    ) -> subscription_pb2.Subscription:
        request = subscription_pb2.CancelSubscriptionRequest(
            subscription_id=subscription_id, at_once=at_once, at=at and timestamp_from_datetime(at)
        )
        ended: subscription_pb2.Subscription = await self.subscriptions.CancelSubscription(
            request, metadata=self.metadata
        )
        return ended

    async def change_plan(
        self, subscription_id: str, plan_id: str, *, at: datetime | None = None, at_once: bool = False
    ) -> subscription_pb2.Subscription:
        request = subscription_pb2.ChangePlanRequest(
            subscription_id=subscription_id, plan_id=plan_id, at_once=at_once, at=at and timestamp_from_datetime(at)
        )
        changed: subscription_pb2.Subscription = await self.subscriptions.ChangePlan(request, metadata=self.metadata)
        return changed

    async def set_settings(self, tenant_id: str, **fields: Any) -> settings_pb2.BillingSettings:
        request = settings_pb2.SetBillingSettingsRequest(tenant_id=tenant_id, **fields)
        settings: settings_pb2.BillingSettings = await self.settings.SetBillingSettings(request, metadata=self.metadata)
        return settings

    async def draft(self, tenant_id: str, period: Period = JANUARY) -> invoice_pb2.Invoice:
        request = invoice_pb2.CreateInvoiceRequest(
            tenant_id=tenant_id,
            period_start=timestamp_from_datetime(period.start),
            period_end=timestamp_from_datetime(period.end),
        )
        invoice: invoice_pb2.Invoice = await self.invoices.CreateInvoice(request, metadata=self.metadata)
        return invoice

    async def finalize(self, invoice_id: str) -> invoice_pb2.Invoice:
        request = invoice_pb2.FinalizeInvoiceRequest(invoice_id=invoice_id)
        invoice: invoice_pb2.Invoice = await self.invoices.FinalizeInvoice(request, metadata=self.metadata)
        return invoice

    async def bill(self, tenant_id: str, period: Period = JANUARY) -> invoice_pb2.Invoice:
        return await self.finalize((await self.draft(tenant_id, period)).id)

    async def get(self, invoice_id: str) -> invoice_pb2.Invoice:
        request = invoice_pb2.GetInvoiceRequest(invoice_id=invoice_id)
        invoice: invoice_pb2.Invoice = await self.invoices.GetInvoice(request, metadata=self.metadata)
        return invoice

    async def list(self, **filters: Any) -> Sequence[invoice_pb2.Invoice]:
        request = invoice_pb2.ListInvoicesRequest(**{"limit": 1000, **filters})
        answer = await self.invoices.ListInvoices(request, metadata=self.metadata)
        return list(answer.invoices)

    async def void(self, invoice_id: str, reason: str = "wrong price") -> invoice_pb2.Invoice:
        request = invoice_pb2.VoidInvoiceRequest(invoice_id=invoice_id, reason=reason)
        invoice: invoice_pb2.Invoice = await self.invoices.VoidInvoice(request, metadata=self.metadata)
        return invoice

    async def mark_paid(self, invoice_id: str, **fields: Any) -> invoice_pb2.Invoice:
        request = invoice_pb2.MarkInvoicePaidRequest(invoice_id=invoice_id, **fields)
        invoice: invoice_pb2.Invoice = await self.invoices.MarkInvoicePaid(request, metadata=self.metadata)
        return invoice

    async def mark_uncollectible(self, invoice_id: str, reason: str = "bankrupt") -> invoice_pb2.Invoice:
        request = invoice_pb2.MarkInvoiceUncollectibleRequest(invoice_id=invoice_id, reason=reason)
        invoice: invoice_pb2.Invoice = await self.invoices.MarkInvoiceUncollectible(request, metadata=self.metadata)
        return invoice

    async def credit(self, invoice_id: str, amount: str | None = None, **fields: Any) -> credit_note_pb2.CreditNote:
        request = credit_note_pb2.CreateCreditNoteRequest(
            **{"invoice_id": invoice_id, "amount": amount, "reason": "goodwill", **fields}
        )
        note: credit_note_pb2.CreditNote = await self.credit_notes.CreateCreditNote(request, metadata=self.metadata)
        return note

    async def balance(self, tenant_id: str, currency: str = "USD") -> str:
        """What the tenant has to its credit; "" where it never had any."""
        request = credit_pb2.ListCreditBalancesRequest(tenant_id=tenant_id)
        answer = await self.credits.ListCreditBalances(request, metadata=self.metadata)
        return next((each.balance for each in answer.credit_balances if each.currency == currency), "")

    async def start_bulk(self, *, finalize: bool, period: Period = JANUARY) -> job_pb2.Job:
        request = invoice_pb2.BulkGenerateInvoicesRequest(
            period_start=timestamp_from_datetime(period.start),
            period_end=timestamp_from_datetime(period.end),
            finalize=finalize,
        )
        job: job_pb2.Job = await self.invoices.BulkGenerateInvoices(request, metadata=self.metadata)
        return job

    async def wait_for(self, job: job_pb2.Job) -> job_pb2.Job:
        async def ended() -> job_pb2.Job | None:
            request = invoice_pb2.GetJobRequest(job_id=job.id)
            now: job_pb2.Job = await self.invoices.GetJob(request, metadata=self.metadata)
            return None if now.state == job_pb2.running else now

        return await until(ended)


@dataclass
class World:
    """What billing calls, and its database. `open_service` starts billing itself, as often as wanted."""

    database: Database
    clock: ManualClock
    ledger: StandInLedger
    identity: StandInIdentity
    peers: Address
    admin: asyncpg.Connection[asyncpg.Record]

    @asynccontextmanager
    async def open_service(self) -> AsyncIterator[grpc.aio.Channel]:
        """A replica of the service, as its own role."""
        settings = BillingSettings(
            listen=Address("127.0.0.1", 0),
            database_url=SecretStr(self.database.role_url("billing")),
            redis_url=SecretStr(self.database.redis_url),
            internal_token=SecretStr(INTERNAL_TOKEN),
            identity_addr=self.peers,
            ingest_addr=self.peers,
            drain_seconds=0,
        )
        async with open_billing(settings, clock=self.clock) as address, open_channel(address) as channel:
            yield channel

    def organization(self, channel: grpc.aio.Channel, org_id: OrgId | None = None) -> Organization:
        """A key of an organization, a new one unless stated."""
        org_id = org_id or OrgId(new_uuid())
        key = new_api_key()
        self.identity.holders[hash_api_key(key)] = org_id
        return Organization(org_id, (("authorization", f"Bearer {key}"),), self.ledger, channel)


@asynccontextmanager
async def open_world(database: Database, *, page_snapshots: int | None = 3) -> AsyncIterator[World]:
    """The peers and the database, without the service."""
    async with AsyncExitStack() as opened:
        ledger, identity = StandInLedger(page_snapshots), StandInIdentity()
        server = grpc.aio.server()
        snapshot_pb2_grpc.add_SnapshotServiceServicer_to_server(ledger, server)
        identity.add_to(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        opened.push_async_callback(server.stop, None)
        admin = await asyncpg.connect(database.admin_url)
        opened.push_async_callback(admin.close)
        clock = ManualClock(datetime(2026, 3, 1, 6, tzinfo=UTC))
        yield World(database, clock, ledger, identity, Address("127.0.0.1", port), admin)


async def until(condition: Callable[[], Awaitable[Any]], *, timeout: timedelta = timedelta(seconds=20)) -> Any:
    """What `condition` answers as soon as it is true."""
    async with asyncio.timeout(timeout.total_seconds()):
        while not (answer := await condition()):  # noqa: ASYNC110 - the condition is in another process
            await asyncio.sleep(0.01)
    return answer


def _snapshot(epoch: int, use: Use) -> snapshot_pb2.Snapshot:
    tenant_id, event_type, day, quantity = use
    snapshot_id: UUID = uuid4()
    return snapshot_pb2.Snapshot(
        id=format_id("snp", snapshot_id),
        epoch=epoch,
        tenant_id=tenant_id,
        event_type=event_type,
        day=day,
        entry_count=1,
        total=quantity,
        root=sha256(snapshot_id.bytes).digest(),
    )
