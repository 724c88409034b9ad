"""One HTTP exchange over ASGI: the request as handlers see it, its body, and the response."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from usameter_gateway.errors import payload_too_large, unsupported_media_type

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_BYTES_MAX = 4 * 1024 * 1024
# A client that is still sending when the connection closes loses our answer with it, so what is too
# large is read and thrown away first; whoever sends more than this cannot expect an answer.
_DISCARDED_BYTES_MAX = 64 * 1024 * 1024

Headers = tuple[tuple[bytes, bytes], ...]
JSON_TYPE: Headers = ((b"content-type", b"application/json"),)


@dataclass(frozen=True, slots=True)
class Request:
    """What the client asks; header names are lower-case, and of equal ones the last counts."""

    verb: str
    query: bytes
    headers: dict[bytes, bytes]
    receive: Receive
    request_id: str


@dataclass(frozen=True, slots=True)
class Response:
    """What the client gets."""

    status: int
    body: bytes
    headers: Headers = JSON_TYPE


async def read_json_body(request: Request) -> bytes:
    """The whole body; empty where there is none.

    Raises:
        ApiError: PAYLOAD_TOO_LARGE, with nothing of the body kept; UNSUPPORTED_MEDIA_TYPE for a
            body that is not declared as plain JSON.
    """
    headers = request.headers
    declared = headers.get(b"content-length", b"")
    # More digits than any length has: int() refuses thousands of them with an error of its own.
    if declared.isdigit() and (len(declared) > 18 or int(declared) > BODY_BYTES_MAX):
        if b"expect" not in headers:  # else the client waits for our word before it sends the body
            await _discard(request.receive)
        raise payload_too_large(BODY_BYTES_MAX)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise unsupported_media_type("Content-Encoding must be identity")
    body = await _read(request.receive)
    if body:
        media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type != b"application/json":
            raise unsupported_media_type("Content-Type must be application/json")
    return body


async def _read(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    length = 0
    more = True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        length += len(chunks[-1])
        more = bool(message.get("more_body"))
        if length > BODY_BYTES_MAX:
            chunks.clear()
            if more:
                await _discard(receive)
            raise payload_too_large(BODY_BYTES_MAX)
    return b"".join(chunks)


async def _discard(receive: Receive) -> None:
    """Read the rest of a body, up to a bound, and keep nothing."""
    discarded = 0
    more = True
    while more and discarded <= _DISCARDED_BYTES_MAX:
        message = await receive()
        discarded += len(message.get("body", b""))
        more = bool(message.get("more_body"))


async def respond(send: Send, request: Request, response: Response) -> None:
    """Send a response; to HEAD without its body, but with its length."""
    headers = [
        *response.headers,
        (b"content-length", str(len(response.body)).encode()),
        (b"x-request-id", request.request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    body = b"" if request.verb == "HEAD" else response.body
    await send({"type": "http.response.body", "body": body})
