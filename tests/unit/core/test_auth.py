"""Asking identity who holds a key."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from usameter.identity.v1 import authentication_pb2, authentication_pb2_grpc
from usameter_core.config import Address
from usameter_core.grpc.auth import IdentityAuthenticator
from usameter_core.grpc.channels import open_channel
from usameter_core.grpc.context import Principal, bind_call
from usameter_core.ids import OrgId, new_uuid

ORG_ID = OrgId(new_uuid())


class SlowIdentity(authentication_pb2_grpc.AuthenticationServiceServicer):
    """Answers when it is let go; notes how much time each caller gave it."""

    def __init__(self) -> None:
        self.seconds_given: list[float] = []
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()

    async def Authenticate(self, request: Any, context: Any) -> authentication_pb2.AuthenticateResponse:
        self.seconds_given.append(context.time_remaining())
        self.asked.set()
        await self.go_on.wait()
        return authentication_pb2.AuthenticateResponse(org_id=str(ORG_ID), api_key_id="key_1", scopes=["usage:read"])


async def test_a_question_that_several_share_is_not_bound_by_the_first_ones_deadline() -> None:
    identity, server = SlowIdentity(), grpc.aio.server()
    authentication_pb2_grpc.add_AuthenticationServiceServicer_to_server(identity, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(10), open_channel(Address("127.0.0.1", port)) as channel:
            authenticator = IdentityAuthenticator(channel, internal_token="internal-token-of-this-test")

            async def call(seconds_left: float) -> Principal:
                bind_call("request", seconds_left)
                return await authenticator.authenticate(b"key")

            tasks = [asyncio.create_task(call(seconds)) for seconds in (1.0, 30.0)]
            await identity.asked.wait()
            identity.go_on.set()
            first, second = await asyncio.gather(*tasks)
    finally:
        await server.stop(None)
    assert first == second
    assert len(identity.seconds_given) == 1
    assert identity.seconds_given[0] > 3
