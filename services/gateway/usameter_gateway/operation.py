"""One route of the contract at work: HTTP in, gRPC call, HTTP out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from usameter.common.v1 import error_pb2
from usameter_gateway.binding import Binding
from usameter_gateway.descriptors import HTTP_BODY
from usameter_gateway.errors import ApiError, error_from_call
from usameter_gateway.exchange import JSON_TYPE, Headers, Request, Response, read_json_body
from usameter_gateway.response import Encoders, json_bytes
from usameter_gateway.retries import is_retry_safe
from usameter_gateway.upstream import Call, Metadata

# Makes of a method's answer what is sent: what it is, and its bytes.
ContentEncoder = Callable[[Message], tuple[Headers, bytes]]


class Operation:
    """Answers the requests of one route.

    Args:
        template: The route, for logs and metrics.
        binding: Makes the request message.
        call: Sends it.
        encode: Makes the body of the answer.
    """

    def __init__(self, *, template: str, binding: Binding, call: Call, encode: ContentEncoder) -> None:
        self.template = template
        self._binding = binding
        self._call = call
        self._encode = encode

    async def __call__(self, request: Request, values: Sequence[str]) -> Response:
        """The response to one request.

        Raises:
            ApiError: The request is refused here or by the service, or the service is away.
        """
        metadata = metadata_of(request)
        body = await read_json_body(request)
        message = self._binding.request(values, request.query, body)
        try:
            reply = await self._call(message, metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(
                error,
                request_id=request.request_id,
                retry_safe=is_retry_safe(request.verb, message),
            ) from error
        headers, content = self._encode(reply.message)
        return Response(202 if reply.accepted else 200, content, headers + reply.headers)


def content_encoder(descriptor: Descriptor, encoders: Encoders) -> ContentEncoder:
    """What makes JSON of a method's answers; a `google.api.HttpBody` is sent as it is.

    Raises:
        TypeError: The type has a field that has no form in REST JSON.
    """
    if descriptor.full_name == HTTP_BODY:
        return _http_body_content
    encode = encoders.of(descriptor)
    return lambda message: (JSON_TYPE, json_bytes(encode(message)))


def _http_body_content(message: Message) -> tuple[Headers, bytes]:
    assert isinstance(message, HttpBody)
    # A browser that guesses at the type might run what was meant to be read.
    headers = ((b"content-type", message.content_type.encode()), (b"x-content-type-options", b"nosniff"))
    return headers, message.data


def metadata_of(request: Request) -> Metadata:
    """What the call that serves a request carries: its id, and its credentials where it has any.

    Raises:
        ApiError: UNAUTHENTICATED, for credentials that no header of gRPC can hold.
    """
    credentials = request.headers.get(b"authorization")
    if credentials is None:
        # Whether a method needs credentials is the service's to say.
        return (("x-request-id", request.request_id),)
    text = credentials.decode("latin-1")
    # gRPC refuses to send anything else, and nobody has such a key.
    if not (text.isascii() and text.isprintable()):
        raise ApiError(error_pb2.UNAUTHENTICATED, "The Authorization header is not printable ASCII")
    return (("x-request-id", request.request_id), ("authorization", text))
