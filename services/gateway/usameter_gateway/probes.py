"""Whether the process is alive, and whether what it needs is there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from usameter_gateway.exchange import Request, Response
from usameter_gateway.response import json_bytes

PROBE_SECONDS = 1.0


class Liveness:
    """Answers as long as the process does; asks nobody, so that a lost service restarts no edge."""

    template = "/healthz"

    async def __call__(self, request: Request, values: Sequence[str]) -> Response:
        """Always 200."""
        return Response(200, json_bytes({"status": "alive"}))


class Readiness:
    """Answers whether every service is SERVING (grpc.health.v1), and names those that are not.

    Args:
        channels: By service name.
    """

    template = "/readyz"

    def __init__(self, channels: Mapping[str, grpc.aio.Channel]) -> None:
        self._stubs = {name: health_pb2_grpc.HealthStub(channel) for name, channel in channels.items()}

    async def __call__(self, request: Request, values: Sequence[str]) -> Response:
        """200, or 503 with `details.not_serving`, within a second."""
        serving = await asyncio.gather(*(self._is_serving(stub) for stub in self._stubs.values()))
        missing = [name for name, is_serving in zip(self._stubs, serving, strict=True) if not is_serving]
        if not missing:
            return Response(200, json_bytes({"status": "ready"}))
        error = {
            "error": f"Not serving: {', '.join(missing)}",
            "code": "UNAVAILABLE",
            "details": {"not_serving": missing},
        }
        return Response(503, json_bytes(error))

    async def _is_serving(self, stub: health_pb2_grpc.HealthStub) -> bool:
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
