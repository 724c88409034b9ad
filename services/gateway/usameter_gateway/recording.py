"""The one route that is no plain transcoding: recording events, which is the hot path.

The body goes to ingest as it came, in a call that others share (see `coalescing`), and the answer
comes back as it is sent. What ingest leaves unread, because something in it is wrong or unusual, is transcoded
like every other request: what is said about a fault is said in one place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio

from usameter.ingest.v1 import event_pb2
from usameter_gateway.binding import Binding
from usameter_gateway.coalescing import CoalescedCall
from usameter_gateway.errors import error_from_call, error_from_refusal
from usameter_gateway.exchange import JSON_TYPE, Request, Response, read_json_body
from usameter_gateway.operation import metadata_of
from usameter_gateway.response import MessageEncoder, json_bytes
from usameter_gateway.retries import is_recording_retry_safe
from usameter_gateway.upstream import rate_limit_headers

_LARGE_BODY_BYTES = 64 * 1024

RECORD_EVENTS = "/usameter.ingest.v1.EventService/RecordEvents"


class RecordOperation:
    """Answers the requests to record events.

    Args:
        template: The route, for logs and metrics.
        binding: Makes the request message, where one is needed.
        call: Sends it.
        encode: Makes JSON of an answer that comes as a message.
    """

    def __init__(self, *, template: str, binding: Binding, call: CoalescedCall, encode: MessageEncoder) -> None:
        self.template = template
        self._binding = binding
        self._call = call
        self._encode = encode

    async def __call__(self, request: Request, values: Sequence[str]) -> Response:
        """The response to one request.

        Raises:
            ApiError: The request is refused here or by the service, or the service is away.
        """
        item = event_pb2.RecordManyItem(request_id=request.request_id)
        item.authorization = dict(metadata_of(request)).get("authorization", "")
        body = await read_json_body(request)

        def message() -> event_pb2.RecordEventsRequest:
            made = self._binding.request(values, request.query, body)
            assert isinstance(made, event_pb2.RecordEventsRequest)
            return made

        if request.query or not body:
            item.request.CopyFrom(message())
        else:
            item.json = body
        try:
            outcome = await self._call(item)
            if outcome.unread:
                # A large one takes seconds, and others are to be served meanwhile.
                made = await asyncio.to_thread(message) if len(body) > _LARGE_BODY_BYTES else message()
                item.request.CopyFrom(made)
                outcome = await self._call(item)
        except grpc.aio.AioRpcError as error:
            safe = is_recording_retry_safe(body)
            raise error_from_call(error, request_id=request.request_id, retry_safe=safe) from error
        headers = JSON_TYPE + rate_limit_headers(outcome.metadata.items())
        match outcome.WhichOneof("outcome"):
            case "json":
                return Response(200, outcome.json, headers)
            case "response":
                return Response(200, json_bytes(self._encode(outcome.response)), headers)
        safe = is_recording_retry_safe(body)
        raise error_from_refusal(outcome.status, outcome.metadata, request_id=request.request_id, retry_safe=safe)
