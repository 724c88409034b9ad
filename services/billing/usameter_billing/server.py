"""Assembles the billing service; the only place where something is opened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

from usameter.billing.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    credit_note_pb2,
    credit_note_pb2_grpc,
    credit_pb2,
    credit_pb2_grpc,
    document_pb2,
    document_pb2_grpc,
    invoice_pb2,
    invoice_pb2_grpc,
    plan_pb2,
    plan_pb2_grpc,
    price_pb2,
    price_pb2_grpc,
    proof_pb2,
    proof_pb2_grpc,
    report_pb2,
    report_pb2_grpc,
    settings_pb2,
    settings_pb2_grpc,
    subscription_pb2,
    subscription_pb2_grpc,
)
from usameter_billing.clients import IngestClient, LedgerClient, OrganizationClient
from usameter_billing.config import BillingSettings
from usameter_billing.service.auditing import InvoiceAudits
from usameter_billing.service.credit_notes import CreditNotes
from usameter_billing.service.documents import InvoiceDocuments
from usameter_billing.service.invoices import Invoices
from usameter_billing.service.job_parts import BulkParts
from usameter_billing.service.jobs import BulkJobs
from usameter_billing.service.ledger import LedgerPull
from usameter_billing.service.marks import MarkDelivery
from usameter_billing.service.plans import Plans
from usameter_billing.service.prices import Prices
from usameter_billing.service.proofs import InvoiceProofs
from usameter_billing.service.report import BillingReports
from usameter_billing.service.settings import Settings
from usameter_billing.service.subscriptions import Subscriptions
from usameter_billing.service.transitions import Transitions
from usameter_billing.servicer.audit import AuditServicer
from usameter_billing.servicer.credit_notes import CreditNoteServicer, CreditServicer
from usameter_billing.servicer.documents import InvoiceDocumentServicer
from usameter_billing.servicer.invoices import InvoiceServicer
from usameter_billing.servicer.plans import PlanServicer
from usameter_billing.servicer.prices import PriceServicer
from usameter_billing.servicer.proofs import InvoiceProofServicer
from usameter_billing.servicer.report import BillingReportServicer
from usameter_billing.servicer.settings import BillingSettingsServicer
from usameter_billing.servicer.subscriptions import SubscriptionServicer
from usameter_core.clock import Clock, SystemClock
from usameter_core.config import Address
from usameter_core.grpc.auth import AccessControl, IdentityAuthenticator
from usameter_core.grpc.channels import open_channel, wait_for_peers
from usameter_core.grpc.server import Servicer, open_server, wait_for_stop
from usameter_core.logging import configure_logging
from usameter_core.metrics import serve_metrics
from usameter_core.postgres.pool import open_pool
from usameter_core.ratelimit.limiter import RateLimiter
from usameter_core.redis.client import open_redis
from usameter_core.tasks import Doorbell, background_tasks, repeat

# So that one organization's large pull does not hold up the others' runs.
_CUTTING_LOOPS = 2
# Invoices/s of one process with one to four, medians of three runs over 6,000 tenants × 5 types on 2 cores that
# others used as well: 2,160, 2,510, 2,470, 2,640. Python computes one batch while PostgreSQL writes another, and two
# are enough for that. The third goes on while one waits for an account that somebody else holds.
BILLING_LOOPS = 3
# Work of other processes and postponed work is found within this time.
_LOOK_SECONDS = 1.0


async def serve() -> None:
    """Serve until the process is told to stop."""
    settings = BillingSettings.from_environment()
    configure_logging(service="billing", log_format=settings.log_format, level=settings.log_level)
    serve_metrics(settings.metrics_port)
    async with open_billing(settings, clock=SystemClock()):
        await wait_for_stop()


@asynccontextmanager
async def open_billing(settings: BillingSettings, *, clock: Clock) -> AsyncIterator[Address]:
    """The service, answering and working; yields the address it listens on.

    On the way out calls are drained first, then the loops stop between or within transactions:
    what they were doing is rolled back, and taken up by whoever comes next.
    """
    internal_token = settings.internal_token.get_secret_value()
    due = timedelta(days=settings.invoice_due_days)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(
            open_pool(settings.database_url.get_secret_value(), application_name="usameter_billing")
        )
        redis, breaker = await stack.enter_async_context(open_redis(settings.redis_url.get_secret_value()))
        identity = await stack.enter_async_context(open_channel(settings.identity_addr))
        ingest_channel = await stack.enter_async_context(open_channel(settings.ingest_addr))
        ingest = IngestClient(ingest_channel, internal_token=internal_token)
        ledger = LedgerPull(pool=pool, ingest=ingest)
        organizations = OrganizationClient(identity, internal_token=internal_token)
        job_started, job_cut, marks_enqueued = Doorbell(), Doorbell(), Doorbell()
        invoices = Invoices(
            pool=pool, clock=clock, ledger=ledger, organizations=organizations, due=due, marks=marks_enqueued
        )
        jobs = BulkJobs(
            pool=pool,
            clock=clock,
            ledger=ledger,
            organizations=organizations,
            started=job_started,
            cut=job_cut,
        )
        parts = BulkParts(pool=pool, clock=clock, due=due, marks=marks_enqueued)
        transitions = Transitions(pool=pool, clock=clock, marks=marks_enqueued)
        credit_notes = CreditNotes(pool=pool, clock=clock)
        delivery = MarkDelivery(pool=pool, ingest=ingest)
        prices = Prices(pool=pool, clock=clock)
        trail = LedgerClient(ingest_channel, internal_token=internal_token)
        proofs = InvoiceProofs(pool=pool, invoices=invoices, ledger=trail)
        tenant_settings = Settings(pool=pool, clock=clock)
        documents = InvoiceDocuments(
            invoices=invoices, settings=tenant_settings, organizations=organizations, ledger=trail
        )

        tasks = await stack.enter_async_context(background_tasks())
        tasks.create_task(repeat(delivery.deliver_due, every_seconds=_LOOK_SECONDS, name="marks", bell=marks_enqueued))
        for _ in range(_CUTTING_LOOPS):
            tasks.create_task(repeat(jobs.cut_waiting, every_seconds=_LOOK_SECONDS, name="jobs", bell=job_started))
        for _ in range(BILLING_LOOPS):
            tasks.create_task(repeat(parts.bill_waiting, every_seconds=_LOOK_SECONDS, name="job_parts", bell=job_cut))

        await wait_for_peers(identity, ingest_channel)
        address = await stack.enter_async_context(
            open_server(
                settings.listen,
                servicers=[
                    Servicer(
                        price_pb2.DESCRIPTOR.services_by_name["PriceService"],
                        price_pb2_grpc.add_PriceServiceServicer_to_server,
                        PriceServicer(prices),
                    ),
                    Servicer(
                        plan_pb2.DESCRIPTOR.services_by_name["PlanService"],
                        plan_pb2_grpc.add_PlanServiceServicer_to_server,
                        PlanServicer(Plans(pool=pool, clock=clock)),
                    ),
                    Servicer(
                        subscription_pb2.DESCRIPTOR.services_by_name["SubscriptionService"],
                        subscription_pb2_grpc.add_SubscriptionServiceServicer_to_server,
                        SubscriptionServicer(Subscriptions(pool=pool, clock=clock), clock=clock),
                    ),
                    Servicer(
                        settings_pb2.DESCRIPTOR.services_by_name["BillingSettingsService"],
                        settings_pb2_grpc.add_BillingSettingsServiceServicer_to_server,
                        BillingSettingsServicer(tenant_settings),
                    ),
                    Servicer(
                        invoice_pb2.DESCRIPTOR.services_by_name["InvoiceService"],
                        invoice_pb2_grpc.add_InvoiceServiceServicer_to_server,
                        InvoiceServicer(invoices=invoices, transitions=transitions, jobs=jobs),
                    ),
                    Servicer(
                        credit_note_pb2.DESCRIPTOR.services_by_name["CreditNoteService"],
                        credit_note_pb2_grpc.add_CreditNoteServiceServicer_to_server,
                        CreditNoteServicer(credit_notes),
                    ),
                    Servicer(
                        credit_pb2.DESCRIPTOR.services_by_name["CreditService"],
                        credit_pb2_grpc.add_CreditServiceServicer_to_server,
                        CreditServicer(credit_notes),
                    ),
                    Servicer(
                        report_pb2.DESCRIPTOR.services_by_name["BillingReportService"],
                        report_pb2_grpc.add_BillingReportServiceServicer_to_server,
                        BillingReportServicer(BillingReports(pool=pool, clock=clock)),
                    ),
                    Servicer(
                        document_pb2.DESCRIPTOR.services_by_name["InvoiceDocumentService"],
                        document_pb2_grpc.add_InvoiceDocumentServiceServicer_to_server,
                        InvoiceDocumentServicer(invoices=invoices, documents=documents),
                    ),
                    Servicer(
                        proof_pb2.DESCRIPTOR.services_by_name["InvoiceProofService"],
                        proof_pb2_grpc.add_InvoiceProofServiceServicer_to_server,
                        InvoiceProofServicer(proofs),
                    ),
                    Servicer(
                        audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
                        audit_pb2_grpc.add_AuditServiceServicer_to_server,
                        AuditServicer(InvoiceAudits(pool=pool, ingest=ingest)),
                    ),
                ],
                control=AccessControl(
                    authenticator=IdentityAuthenticator(identity, internal_token=internal_token),
                    limiter=RateLimiter(redis, breaker, clock=clock),
                    internal_token=internal_token,
                ),
                drain_seconds=settings.drain_seconds,
            )
        )
        yield address
