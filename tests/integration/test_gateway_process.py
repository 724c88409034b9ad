"""The gateway as a process of its own: environment in, signals in, exit code out."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import httpx

from usameter_devstack.ports import free_port

SERVE = (sys.executable, "-m", "usameter_gateway", "serve")


def environment(**settings: str) -> dict[str, str]:
    """This one without settings of any service, and these."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("USAMETER_")}
    return inherited | {f"USAMETER_{name.upper()}": value for name, value in settings.items()}


async def test_it_serves_without_its_services_and_ends_on_sigterm() -> None:
    port = free_port()
    addresses = {f"{name}_addr": f"127.0.0.1:{free_port()}" for name in ("identity", "ingest", "quota", "billing")}
    process = await asyncio.create_subprocess_exec(
        *SERVE, env=environment(listen=f"127.0.0.1:{port}", **addresses), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        line = await asyncio.wait_for(process.stderr.readline(), 20)
        assert b"server_started" in line
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.get("/healthz")).status_code == 200
            ready = await client.get("/readyz")
            assert ready.json()["details"] == {"not_serving": ["identity", "ingest", "quota", "billing"]}
            secret = await client.get("/api/v1/usage?tenant_id=t-1", headers={"authorization": "Bearer usa_secret"})
            assert secret.status_code == 503
        process.send_signal(signal.SIGTERM)
        _, rest = await asyncio.wait_for(process.communicate(), 10)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    assert b'"route":"/api/v1/usage"' in rest
    # Neither credentials nor what was asked for.
    assert b"usa_secret" not in rest and b"t-1" not in rest


async def test_a_missing_address_is_named() -> None:
    process = await asyncio.create_subprocess_exec(
        *SERVE, env=environment(listen="127.0.0.1:0"), stderr=asyncio.subprocess.PIPE
    )
    _, text = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert b"USAMETER_INGEST_ADDR" in text
