"""Whether a service is ready: asked over the network, as its callers will."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from usameter_devstack.child import ReadyProbe
from usameter_devstack.ports import LOOPBACK

_DEADLINE_SECONDS = 1.0


def grpc_probe(port: int) -> ReadyProbe:
    """A probe that is true once grpc.health.v1 on that port says SERVING for the whole server."""

    async def ready() -> bool:
        # Imported here: it costs 0.15 s, which `usameter status` should not pay, and which a start pays
        # while its services are still importing the same.
        import grpc.aio  # noqa: PLC0415
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

        # A channel for each question: a channel that was refused once waits a second before it tries again.
        async with grpc.aio.insecure_channel(f"{LOOPBACK}:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=_DEADLINE_SECONDS)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return ready


def http_probe(port: int, path: str = "/readyz") -> ReadyProbe:
    """A probe that is true once GET `path` on that port answers 200."""

    async def ready() -> bool:
        try:
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
        except OSError:
            return False
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {LOOPBACK}\r\nConnection: close\r\n\r\n".encode())
            await writer.drain()
            status_line = await asyncio.wait_for(reader.readline(), _DEADLINE_SECONDS)
        except (OSError, TimeoutError):
            return False
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        return status_line.split(b" ")[1:2] == [b"200"]

    return ready
