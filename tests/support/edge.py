"""A gateway over real sockets, with gRPC servers behind it that answer what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from usameter.billing.v1 import document_pb2_grpc, invoice_pb2_grpc
from usameter.common.v1 import job_pb2
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter.quota.v1 import quota_pb2, quota_pb2_grpc
from usameter_core.config import Address
from usameter_core.errors import (
    Unauthenticated,
    UsameterError,
)
from usameter_core.grpc.server import SERVER_OPTIONS
from usameter_core.grpc.status import DETAILS_KEY, status_of
from usameter_gateway.config import GatewaySettings
from usameter_gateway.server import open_gateway

LOCAL = Address("127.0.0.1", 0)
SERVICES = ("identity", "ingest", "quota", "billing")
PDF = b"%PDF-1.7\n\x00\xff"
EVENT = {"event_type": "api_request", "tenant_id": "t", "idempotency_key": "k"}


@dataclass
class Backend:
    """What the services were asked, and what they are to answer."""

    requests: list[Message] = field(default_factory=list)
    # Calls that carried events, many requests each.
    calls: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    failure: UsameterError | grpc.StatusCode | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    # Holds answers back until it is set.
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: Message, context: Any, response: Message) -> Message:
        self.requests.append(request)
        self.arrived.set()
        self.metadata = dict(context.invocation_metadata())
        await self.go_on.wait()
        if isinstance(self.failure, UsameterError):
            code, status = status_of(self.failure)
            context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
            await context.abort(code, status.message)
        if self.failure is not None:
            await context.abort(self.failure, "for operators only")
        return response


class Events(event_pb2_grpc.EventServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def RecordMany(self, request: Any, context: Any) -> Any:
        """Answers like an ingest that reads no JSON: item by item, each by its own credentials."""
        backend = self.backend
        if all(item.WhichOneof("content") == "json" for item in request.items):
            return event_pb2.RecordManyResponse(outcomes=[event_pb2.RecordOutcome(unread=True) for _ in request.items])
        outcomes = []
        for item in request.items:
            backend.requests.append(item.request)
            backend.metadata = {"authorization": item.authorization, "x-request-id": item.request_id}
            answer = event_pb2.RecordEventsResponse(success=True, event_id="evt_1", deduplicated=False)
            refused = isinstance(backend.failure, UsameterError) or item.authorization == "Bearer nobody"
            error = backend.failure if isinstance(backend.failure, UsameterError) else Unauthenticated()
            outcomes.append(
                event_pb2.RecordOutcome(status=status_of(error)[1].SerializeToString())
                if refused
                else event_pb2.RecordOutcome(response=answer)
            )
        backend.calls += 1
        backend.arrived.set()
        await backend.go_on.wait()
        if isinstance(backend.failure, grpc.StatusCode):
            await context.abort(backend.failure, "for operators only")
        return event_pb2.RecordManyResponse(outcomes=outcomes)

    async def GetEvent(self, request: Any, context: Any) -> Any:
        return await self.backend.answer(request, context, event_pb2.Event(id=request.event_id, quantity=10000))

    async def VoidEvent(self, request: Any, context: Any) -> Any:
        return await self.backend.answer(request, context, event_pb2.Correction(event_id=request.event_id))


class Quotas(quota_pb2_grpc.QuotaServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def SetQuota(self, request: Any, context: Any) -> Any:
        quota = quota_pb2.Quota(tenant_id=request.tenant_id, event_type=request.event_type)
        return await self.backend.answer(request, context, quota)

    async def DeleteQuota(self, request: Any, context: Any) -> Any:
        return await self.backend.answer(request, context, quota_pb2.DeleteQuotaResponse())


class Invoices(invoice_pb2_grpc.InvoiceServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def BulkGenerateInvoices(self, request: Any, context: Any) -> Any:
        context.set_trailing_metadata((("usameter-http-status", "202"),))
        return await self.backend.answer(request, context, job_pb2.Job(id="job_1", state=job_pb2.running))


class Documents(document_pb2_grpc.InvoiceDocumentServiceServicer):
    """Answers in a form of its own."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def GetInvoicePdf(self, request: Any, context: Any) -> Any:
        context.set_trailing_metadata((("content-disposition", 'inline; filename="invoice-7.pdf"'),))
        return await self.backend.answer(request, context, HttpBody(content_type="application/pdf", data=PDF))

    async def GetInvoiceHtml(self, request: Any, context: Any) -> Any:
        return await self.backend.answer(request, context, HttpBody(content_type="text/html; charset=utf-8"))


@dataclass
class Edge:
    """A gateway, a client of it, and what is behind it."""

    client: httpx.AsyncClient
    backend: Backend
    servers: dict[str, grpc.aio.Server]
    settings: GatewaySettings
    address: Address

    async def record(self, **arguments: Any) -> httpx.Response:
        return await self.client.post("/api/v1/events", **arguments)


def registrations(backend: Backend) -> dict[str, Callable[[grpc.aio.Server], None]]:
    return {
        "ingest": lambda server: event_pb2_grpc.add_EventServiceServicer_to_server(Events(backend), server),
        "quota": lambda server: quota_pb2_grpc.add_QuotaServiceServicer_to_server(Quotas(backend), server),
        "billing": lambda server: register_billing(backend, server),
    }


def register_billing(backend: Backend, server: grpc.aio.Server) -> None:
    invoice_pb2_grpc.add_InvoiceServiceServicer_to_server(Invoices(backend), server)
    document_pb2_grpc.add_InvoiceDocumentServiceServicer_to_server(Documents(backend), server)


@asynccontextmanager
async def open_edge() -> AsyncIterator[Edge]:
    backend = Backend()
    backend.go_on.set()
    servers, addresses = {}, {}
    for name in SERVICES:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        registrations(backend).get(name, lambda _: None)(server)
        checks = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        addresses[f"{name}_addr"] = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        servers[name] = server
    settings = GatewaySettings(listen=LOCAL, **addresses)
    async with AsyncExitStack() as stack:
        for server in servers.values():
            stack.push_async_callback(server.stop, None)
        address = await stack.enter_async_context(open_gateway(settings))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://{address}"))
        yield Edge(client, backend, servers, settings, address)
