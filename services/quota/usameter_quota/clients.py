"""Sending to webhook endpoints, which are programs of others: nothing they say or resolve to is trusted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpx

from usameter_quota.domain.addresses import is_public

# (host, port) to addresses; raises OSError where there are none.
Resolve = Callable[[str, int], Awaitable[list[str]]]

# A look-up occupies its thread for as long as a name server likes to be silent, so there are as many as there may be
# attempts at once. (The loop's own threads are few, and shared with all of the process.)
_RESOLVER_THREADS = 128
_DEFAULT_PORTS = {"http": 80, "https": 443}
_ERROR_CHARACTERS_MAX = 300


class NotSent(Exception):
    """No answer came, or none was asked for; the text says why, to the owner of the endpoint."""


class WebhookClient:
    """Posts to URLs that customers chose, from inside our network.

    A host is resolved here and each of its addresses checked; then the connection is made to a checked address and not
    to the name, which might resolve to something else a moment later. Every attempt has a connection of its own: one
    that was made for another name must not be used for this one because the address is the same.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        *,
        resolve: Resolve,
        allow_private: bool,
        timeout_seconds: float,
    ) -> None:
        self._transport = transport
        self._resolve = resolve
        self._allow_private = allow_private
        self._timeout_seconds = timeout_seconds

    async def check(self, url: str) -> None:
        """Return if a message could be sent there now.

        Raises:
            NotSent: The URL is of a form that is never sent to, or its host does not resolve to public addresses only.
        """
        async with self._deadline():
            await self._find_addresses(self._parse(url))

    async def post(self, url: str, *, body: bytes, headers: Mapping[str, str]) -> int:
        """Send JSON once; returns the status code of the answer, of which nothing else is read.

        Redirects are answers like others.

        Raises:
            NotSent: As `check`; or nobody answered in time. The message may have arrived all the same.
        """
        parsed = self._parse(url)
        async with self._deadline():
            addresses = await self._find_addresses(parsed)
            for address in addresses:
                request = httpx.Request(
                    "POST",
                    parsed.copy_with(host=address),
                    headers={
                        "host": parsed.netloc.decode("ascii"),
                        "content-type": "application/json",
                        "user-agent": "usameter-webhooks",
                        **headers,
                    },
                    content=body,
                    # The certificate must be the name's, not the address's.
                    extensions={"sni_hostname": parsed.raw_host.decode("ascii")},
                )
                try:
                    response = await self._transport.handle_async_request(request)
                except httpx.ConnectError as error:
                    # Nothing was sent. The next address may be of the other IP version, or of a host that lives.
                    if address == addresses[-1]:
                        raise _not_sent(error) from error
                except httpx.TransportError as error:
                    raise _not_sent(error) from error
                else:
                    await response.aclose()
                    return response.status_code
        raise AssertionError("there is at least one address")

    def _parse(self, url: str) -> httpx.URL:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise NotSent(f"is no URL: {error}") from error
        if parsed.scheme != "https" and not (parsed.scheme == "http" and self._allow_private):
            raise NotSent("must begin with https://")
        if not parsed.host or parsed.userinfo or parsed.fragment:
            raise NotSent("must have a host, and no user, password or fragment")
        if parsed.port is not None and not 0 < parsed.port < 65_536:
            raise NotSent("must have a port from 1 to 65535")
        return parsed

    async def _find_addresses(self, url: httpx.URL) -> list[str]:
        host = url.raw_host.decode("ascii")
        try:
            addresses = await self._resolve(host, url.port or _DEFAULT_PORTS[url.scheme])
        except (OSError, UnicodeError) as error:
            raise NotSent(f"host {host} does not resolve") from error
        # One that is not public condemns them all: a name of both kinds is no accident.
        if not self._allow_private and not all(is_public(address) for address in addresses):
            raise NotSent(f"host {host} resolves to an address that is not public")
        return addresses

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                yield
        except TimeoutError:
            raise NotSent(f"did not answer within {self._timeout_seconds:g} s") from None


@asynccontextmanager
async def open_webhook_client(*, allow_private: bool, timeout_seconds: float = 10) -> AsyncIterator[WebhookClient]:
    """A client that resolves names as the system does.

    Args:
        allow_private: Also send to http:// and to addresses that are not public: for development.
        timeout_seconds: For an attempt, from resolving the name to the head of the answer.
    """
    threads = ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="resolver")

    async def resolve(host: str, port: int) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(address[0]) for *_, address in found]

    # A transport and not a client: that would keep cookies, for the next customer at the same address.
    transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
    try:
        async with transport:
            yield WebhookClient(
                transport, resolve=resolve, allow_private=allow_private, timeout_seconds=timeout_seconds
            )
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _not_sent(error: httpx.TransportError) -> NotSent:
    return NotSent((str(error) or type(error).__name__)[:_ERROR_CHARACTERS_MAX])
