"""A server for the recorders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc.aio
import pytest

from tests.support.recorder import LOCAL, GrpcServer, HttpServer, Ledger, World
from usameter.ingest.v1 import event_pb2_grpc
from usameter_devstack.fault_proxy import FaultProxy


@pytest.fixture(params=["rest", "grpc"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    ledger = Ledger()
    async with AsyncExitStack() as opened:
        if request.param == "rest":
            server = await asyncio.start_server(HttpServer(ledger).serve, LOCAL, 0, limit=8_000_000)
            opened.callback(server.close)
            port = server.sockets[0].getsockname()[1]
        else:
            grpc_server = grpc.aio.server()
            event_pb2_grpc.add_EventServiceServicer_to_server(GrpcServer(ledger), grpc_server)
            port = grpc_server.add_insecure_port(f"{LOCAL}:0")
            await grpc_server.start()
            opened.push_async_callback(grpc_server.stop, grace=0)
        yield World(request.param, ledger, await opened.enter_async_context(FaultProxy(LOCAL, port)))
