"""The ASGI application: finds the route, answers, and says so in one log line and one metric."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol

import grpc.aio
from prometheus_client import Histogram

from usameter_core.logging import get_logger
from usameter_gateway.binding import Binding
from usameter_gateway.coalescing import CoalescedCall
from usameter_gateway.descriptors import Method
from usameter_gateway.documents import docs_page, openapi_document
from usameter_gateway.errors import ApiError, internal
from usameter_gateway.exchange import JSON_TYPE, Receive, Request, Response, Scope, Send, respond
from usameter_gateway.operation import Operation, content_encoder
from usameter_gateway.probes import Liveness, Readiness
from usameter_gateway.recording import RECORD_EVENTS, RecordOperation
from usameter_gateway.request import Converters
from usameter_gateway.response import Encoders
from usameter_gateway.routes import Router
from usameter_gateway.upstream import unary_call

log = get_logger()

REQUEST_SECONDS = Histogram(
    "usameter_gateway_request_seconds",
    "Seconds an HTTP request took, by method, route template and status.",
    ["method", "route", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)

# Finding the series of three labels takes longer than adding to it.
_seconds_of = functools.lru_cache(maxsize=10_000)(REQUEST_SECONDS.labels)
# What a client may choose: it is copied into logs and headers of every service.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,64}").fullmatch


class Handler(Protocol):
    """Answers the requests of one route; raises ApiError."""

    @property
    def template(self) -> str:
        """The route, for logs and metrics."""

    def __call__(self, request: Request, values: Sequence[str]) -> Awaitable[Response]:
        """The response; `values` are those of the template's variables."""


class Gateway:
    """Serves HTTP requests over ASGI.

    Args:
        router: Every route, with the handler that answers it.
    """

    def __init__(self, router: Router[Handler]) -> None:
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        started = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request = Request(scope["method"], scope["query_string"], headers, receive, _request_id(headers))
        route = "unknown"
        try:
            path = scope["raw_path"].decode("latin-1")
            handler, values = self._router.find(request.verb, path)
            route = handler.template
            response = await handler(request, values)
        except ApiError as error:
            response = _error_response(error)
        except Exception as error:
            # The loop's top: the client gets an id, the log everything.
            log.error("request_failed", request_id=request.request_id, exc_info=error)
            response = _error_response(internal(request.request_id))
        await respond(send, request, response)
        seconds = time.perf_counter() - started
        # The client may send any word as the method, and labels must be few.
        method = request.verb if route != "unknown" else "any"
        _seconds_of(method, route, response.status).observe(seconds)
        log.info(
            "request_served",
            method=request.verb,
            route=route,
            status=response.status,
            duration_ms=round(seconds * 1000, 1),
            request_id=request.request_id,
        )


def _request_id(headers: dict[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _REQUEST_ID(given) else os.urandom(16).hex()


def _error_response(error: ApiError) -> Response:
    return Response(error.status, error.body(), JSON_TYPE + error.headers)


def gateway(methods: Sequence[Method], channels: Mapping[str, Sequence[grpc.aio.Channel]]) -> Gateway:
    """The application for a contract.

    Args:
        methods: Every method with a route.
        channels: By the name of the service that owns methods, e.g. "ingest"; its calls are spread over them.

    Raises:
        TypeError, ValueError: A route or message of the contract has no form in REST.
    """
    router: Router[Handler] = Router()
    converters, encoders = Converters(), Encoders()
    for method in methods:
        for rule in method.rules:
            binding = Binding(method, rule, converters)
            operation: Handler
            if method.path == RECORD_EVENTS:
                call = CoalescedCall(channels[method.owner])
                json_encode = encoders.of(method.response)
                operation = RecordOperation(template=rule.template, binding=binding, call=call, encode=json_encode)
            else:
                unary = unary_call(channels[method.owner], method)
                encode = content_encoder(method.response, encoders)
                operation = Operation(template=rule.template, binding=binding, call=unary, encode=encode)
            router.add(rule.verb, rule.template, operation)
    readiness = Readiness({name: each[0] for name, each in channels.items()})
    for own in (Liveness(), readiness, openapi_document(methods), docs_page()):
        router.add("GET", own.template, own)
    return Gateway(router)
