"""The ceiling of single events: a gateway in front of a service that does nothing.

The route is `POST /api/v1/events/{event_id}:amend`: a body, a path variable and an answer of several
fields, so that the gateway does all it does for an event. Not `POST /api/v1/events` itself, because
the gateway may pack several of those into one call, and the ceiling is one call a request.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from tests.bench.load import expect_ok, http_request, open_connections, send_closed
from tests.bench.machine import ROOT
from usameter.ingest.v1 import event_pb2
from usameter_devstack.ports import LOOPBACK, free_ports

_START_SECONDS_MAX = 20
_EVENT_ID = f"evt_{0:032x}"
_BODY = b'{"quantity":1,"reason":"The client had counted a retry as a second request"}'
ECHO_REQUEST = http_request("POST", f"/api/v1/events/{_EVENT_ID}:amend", "usa_any", _BODY)


async def amend_event(request: event_pb2.AmendEventRequest, _: Any) -> event_pb2.Correction:
    """Answers at once, and asks nobody who is calling."""
    return event_pb2.Correction(
        event_id=request.event_id,
        kind=event_pb2.AMEND,
        quantity_delta="1",
        quantity_decimal="1",
        reason=request.reason,
    )


async def serve(port: int) -> None:
    """Answer on a port until killed."""
    handler = grpc.unary_unary_rpc_method_handler(
        amend_event,
        request_deserializer=event_pb2.AmendEventRequest.FromString,
        response_serializer=event_pb2.Correction.SerializeToString,
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("usameter.ingest.v1.EventService", {"AmendEvent": handler})]
    )
    server.add_insecure_port(f"{LOOPBACK}:{port}")
    await server.start()
    await server.wait_for_termination()


@asynccontextmanager
async def open_echo(directory: Path) -> AsyncIterator[str]:
    """The echo and a gateway in front of it, each in a process of its own; yields the gateway's URL."""
    echo_port, gateway_port = free_ports(2)
    peers = {f"USAMETER_{name}_ADDR": f"{LOOPBACK}:{echo_port}" for name in ("IDENTITY", "INGEST", "QUOTA", "BILLING")}
    environment = {**os.environ, **peers, "USAMETER_LISTEN": f"{LOOPBACK}:{gateway_port}"}
    url = f"http://{LOOPBACK}:{gateway_port}"
    with (directory / "echo.log").open("ab") as log:
        # The gateway logs to a file here as it does in the platform: its log lines cost it a tenth of its time.
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", *arguments, env=environment, cwd=ROOT, stdout=log, stderr=log
            )
            for arguments in (("tests.bench.echo", str(echo_port)), ("usameter_gateway", "serve"))
        ]
    try:
        await _wait_until_echoing(url)
        yield url
    finally:
        for process in processes:
            process.terminate()
            await process.wait()


async def _wait_until_echoing(url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    while True:
        try:
            async with open_connections(url, 1) as connections:
                await send_closed(connections, [ECHO_REQUEST], expect_ok)
                return
        except (OSError, ExceptionGroup):
            # Not listening yet, or a gateway that has not found the echo yet.
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
