"""What happens around every call, outermost first: context, log and errors; access; validation."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
from uuid import uuid4

import grpc
import protovalidate
import structlog
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from grpc_interceptor.server import AsyncServerInterceptor
from protovalidate import Violation

from usameter.common.v1 import options_pb2
from usameter_core.errors import FieldViolation, Internal, InvalidArgument, UsameterError
from usameter_core.grpc.auth import AccessControl
from usameter_core.grpc.context import bind_call, current_request_id
from usameter_core.grpc.status import DETAILS_KEY, internal_status, status_of
from usameter_core.grpc.texts import nul_violations
from usameter_core.logging import get_logger
from usameter_core.metrics import CALL_SECONDS

log = get_logger()
Context = grpc.aio.ServicerContext[Any, Any]

# Finding the series of two labels takes longer than adding to it. Methods are those that are served, so they are few.
_seconds_of = functools.cache(CALL_SECONDS.labels)

# Health checks and reflection: of the server itself, open to whoever reaches the port.
_OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
_REQUEST_ID_CHARACTERS_MAX = 64


class CallInterceptor(AsyncServerInterceptor):
    """Gives each call its request id and deadline, logs and times it, and puts its error on the wire."""

    async def intercept(
        self,
        method: Callable[..., Any],
        request_or_iterator: Any,
        context: Context,
        method_name: str,
    ) -> Any:
        """Serve one call. Errors that are no `UsameterError` become INTERNAL and a request id."""
        if method_name.startswith(_OPEN_SERVICES):
            response = method(request_or_iterator, context)
            return response if hasattr(response, "__aiter__") else await response
        metadata = dict(context.invocation_metadata() or ())
        request_id = _text(metadata.get("x-request-id"))[:_REQUEST_ID_CHARACTERS_MAX] or uuid4().hex
        bind_call(request_id, context.time_remaining())
        structlog.contextvars.bind_contextvars(request_id=request_id, method=method_name)
        response = method(request_or_iterator, context)
        if hasattr(response, "__aiter__"):
            return self._stream(response, context, method_name)
        with _observed(method_name) as call:
            try:
                answer = await response
                call.code = grpc.StatusCode.OK
                return answer
            except Exception as error:
                # The top of a call, here and in `_stream`: whatever it was becomes a status.
                status = call.fail(error)
        return await _abort(context, call.code, status)

    async def _stream(self, responses: AsyncIterator[Message], context: Context, method_name: str) -> Any:
        with _observed(method_name) as call:
            try:
                async for response in responses:
                    yield response
                call.code = grpc.StatusCode.OK
                return
            except Exception as error:
                status = call.fail(error)
        await _abort(context, call.code, status)


class _Call:
    """How a call ends: CANCELLED, where neither an answer nor an error comes of it."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.CANCELLED

    def fail(self, error: Exception) -> Status:
        """The status of what the call raised; what is no `UsameterError` is logged and told to nobody."""
        if isinstance(error, UsameterError) and not isinstance(error, Internal):
            self.code, status = status_of(error)
        else:
            log.error("call_failed", exc_info=error)
            self.code, status = internal_status(current_request_id())
        return status


@contextmanager
def _observed(method_name: str) -> Iterator[_Call]:
    call = _Call()
    started = time.perf_counter()
    try:
        yield call
    finally:
        seconds = time.perf_counter() - started
        _seconds_of(method_name, call.code.name).observe(seconds)
        log.info("call_served", code=call.code.name, duration_ms=round(seconds * 1000, 1))


async def _abort(context: Context, code: grpc.StatusCode, status: Status) -> NoReturn:
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
    await context.abort(code, status.message)
    raise AssertionError("unreachable: abort raises")


class AccessInterceptor(AsyncServerInterceptor):
    """Lets a call pass that satisfies its method's `access` option and the rate limits of its API key.

    Args:
        access: By full method name, "/package.Service/Method".
        control: What decides.
    """

    def __init__(self, access: Mapping[str, options_pb2.Access], control: AccessControl) -> None:
        self._access = access
        self._control = control

    async def intercept(
        self,
        method: Callable[..., Any],
        request_or_iterator: Any,
        context: Context,
        method_name: str,
    ) -> Any:
        """Serve one call, or raise Unauthenticated, PermissionDenied or RateLimited."""
        if not method_name.startswith(_OPEN_SERVICES):
            metadata = dict(context.invocation_metadata() or ())
            standing = await self._control.admit(self._access[method_name], _text(metadata.get("authorization")))
            if standing is not None:
                await context.send_initial_metadata(standing.metadata)
                standing.require_admitted()
        response = method(request_or_iterator, context)
        return response if hasattr(response, "__aiter__") else await response


class ValidationInterceptor(AsyncServerInterceptor):
    """Refuses requests that break the rules stated in the protos (protovalidate), or whose texts contain NUL.

    Args:
        except_methods: Full names of methods whose servicers check all of that themselves.
    """

    def __init__(self, except_methods: Collection[str]) -> None:
        self._except_methods = frozenset(except_methods)

    async def intercept(
        self,
        method: Callable[..., Any],
        request_or_iterator: Any,
        context: Context,
        method_name: str,
    ) -> Any:
        """Serve one call, or raise InvalidArgument with every violation."""
        if (
            isinstance(request_or_iterator, Message)
            and method_name not in self._except_methods
            and not method_name.startswith(_OPEN_SERVICES)
        ):
            violations = [_field_violation(each) for each in protovalidate.collect_violations(request_or_iterator)]
            named = {each.field for each in violations}
            violations += (each for each in nul_violations(request_or_iterator) if each.field not in named)
            if violations:
                raise InvalidArgument(violations)
        response = method(request_or_iterator, context)
        return response if hasattr(response, "__aiter__") else await response


def _field_violation(violation: Violation) -> FieldViolation:
    path = ""
    for element in violation.proto.field.elements if violation.proto.field is not None else ():
        path += f".{element.field_name}" if path else element.field_name
        subscript = element.subscript
        if subscript is not None:
            path += f"[{subscript.value}]"
    return FieldViolation(path, violation.proto.message)


def _text(value: str | bytes | None) -> str:
    return value if isinstance(value, str) else ""
