"""Requests to the REST API: tried again where the server is away for a moment, and refusals in a sentence."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import msgspec

from usameter_cli.connection import Connection
from usameter_cli.errors import CliError, Refused, Unreachable

Answer = dict[str, Any]
Shape = TypeVar("Shape")

_RETRIED_STATUSES = frozenset({429, 502, 503, 504})
_BACKOFF_SECONDS_FIRST = 0.1
_BACKOFF_SECONDS_MAX = 5.0
_TIMEOUT = httpx.Timeout(30.0, connect=5.0)


class ApiClient:
    """Sends requests; may be used by several threads at once.

    Every request that goes through here may be sent again: reads, events that carry idempotency keys,
    and billing's own repeatable commands. So a lost answer is retried like a refused connection.

    Args:
        http: With base URL and key set.
        patience_seconds: How long one request is tried again before it counts as failed.
        on_retry: Told why, before each pause.
    """

    def __init__(
        self, http: httpx.Client, *, patience_seconds: float, on_retry: Callable[[str], None] = lambda _: None
    ) -> None:
        self._http = http
        self._patience_seconds = patience_seconds
        self._on_retry = on_retry
        self._answered = False
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """From here on nothing is tried again, and pauses end; what is under way still gets its answer."""
        self._given_up.set()

    def get(self, path: str, parameters: Mapping[str, str | int | None] | None = None) -> Answer:
        """Read a resource; parameters that are None are not sent. Fails as `post` does."""
        given = {name: value for name, value in (parameters or {}).items() if value is not None}
        return _answer_of(self._send(self._http.build_request("GET", path, params=given)))

    def download(self, path: str) -> bytes:
        """Read a file, as it comes. Fails as `post` does."""
        response = self._send(self._http.build_request("GET", path))
        if not response.is_success:
            raise _refusal_of(response)
        return response.content

    def post(self, path: str, body: bytes | Mapping[str, Any]) -> Answer:
        """Send a JSON object, encoded or not.

        Raises:
            Unreachable: No answer, or none but "come back later", for `patience_seconds`.
            Refused: The server's error.
        """
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return _answer_of(
            self._send(
                self._http.build_request("POST", path, content=content, headers={"content-type": "application/json"})
            )
        )

    def _send(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + self._patience_seconds
        attempt = 0
        while True:
            pause_seconds = 0.0
            try:
                response = self._http.send(request)
            except httpx.ConnectError as error:
                if not self._answered:
                    # Nobody has ever been there: more likely a wrong URL than a server that restarts.
                    raise Unreachable(
                        f"No server answers at {self._http.base_url}. Is it running (`usameter status`)?"
                    ) from error
                problem = "the server cannot be reached"
            except httpx.TransportError as error:
                problem = f"the server did not answer ({type(error).__name__})"
            else:
                self._answered = True
                if response.status_code not in _RETRIED_STATUSES:
                    return response
                problem = _sentence_of(response)
                pause_seconds = _retry_after_seconds(response)
            pause_seconds = max(pause_seconds, _backoff_seconds(attempt))
            attempt += 1
            if time.monotonic() + pause_seconds > deadline or self._given_up.is_set():
                raise Unreachable(f"{problem}; gave up after {attempt} attempts. Trying again later is safe.")
            self._on_retry(problem)
            self._given_up.wait(pause_seconds)


@contextmanager
def open_api(
    connection: Connection, *, patience_seconds: float = 10.0, on_retry: Callable[[str], None] = lambda _: None
) -> Iterator[ApiClient]:
    """A client for the server, with its key on every request."""
    with httpx.Client(
        base_url=connection.url,
        headers={"authorization": f"Bearer {connection.api_key}"},
        timeout=_TIMEOUT,
        # The key goes to the server that was named and to nobody it, or the environment, points to.
        follow_redirects=False,
        trust_env=False,
    ) as http:
        yield ApiClient(http, patience_seconds=patience_seconds, on_retry=on_retry)


def read_as(shape: type[Shape], answer: object) -> Shape:
    """The answer as a value. Integers may come as strings, as protobuf writes 64-bit ones.

    Raises:
        CliError: It is something else; the server is of another release.
    """
    try:
        return msgspec.convert(answer, shape, strict=False)
    except msgspec.ValidationError as error:
        raise CliError(f"The server's answer is not what this release expects: {error}.") from error


def _answer_of(response: httpx.Response) -> Answer:
    answer = _decoded(response)
    if response.is_success and answer is not None:
        return answer
    raise _refusal_of(response)


def _refusal_of(response: httpx.Response) -> Refused:
    answer = _decoded(response)
    details = (answer or {}).get("details")
    return Refused(
        _sentence_of(response),
        code=str((answer or {}).get("code", "")),
        details=details if isinstance(details, dict) else None,
    )


def _sentence_of(response: httpx.Response) -> str:
    answer = _decoded(response)
    if answer is None or "error" not in answer:
        url = response.request.url.copy_with(query=None)
        return f"{url} answered {response.status_code}, and not as a Usameter server does"
    details = answer.get("details")
    request_id = details.get("request_id") if isinstance(details, dict) else None
    return f"{answer['error']} (request {request_id})" if request_id else str(answer["error"])


def _decoded(response: httpx.Response) -> Answer | None:
    """The JSON object of the answer; None where it is something else, such as a proxy's page."""
    try:
        return msgspec.json.decode(response.content, type=dict[str, Any])
    except msgspec.DecodeError:
        return None


def _retry_after_seconds(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _backoff_seconds(attempt: int) -> float:
    # Full jitter: batches that failed together do not come back together.
    bound = min(_BACKOFF_SECONDS_MAX, _BACKOFF_SECONDS_FIRST * 2**attempt)
    return random.uniform(bound / 10, bound)  # noqa: S311 - jitter, not a secret
