"""TCP ports on 127.0.0.1: which are free, and a clear error for one that is not."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

from usameter_devstack.errors import HTTP_PORT_VARIABLE, PortTaken

LOOPBACK = "127.0.0.1"

# Below what Linux (32768) and macOS (49152) give to outgoing connections: no stranger's connection can take
# a port of ours between our looking and our server's binding it.
_FIRST_PORT = 20_000
_LAST_PORT = 29_999
_ATTEMPTS_MAX = 2_000


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now; another program may be faster."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as candidate:
        return _bound(candidate, port)


def check_port(port: int, what: str, *, variable: str | None = HTTP_PORT_VARIABLE) -> None:
    """Do nothing if `port` is free.

    Raises:
        PortTaken: It is not; the sentence says what wants it, and names the variable that changes it, if any.
    """
    if not port_is_free(port):
        raise PortTaken(port, what, variable=variable)


def free_ports(count: int) -> list[int]:
    """`count` different ports that are free now, in random order.

    Raises:
        PortTaken: Nearly all ports from 20000 to 29999 are in use.
    """
    chosen: list[int] = []
    with ExitStack() as held:
        for _ in range(_ATTEMPTS_MAX):
            if len(chosen) == count:
                return chosen
            port = random.randint(_FIRST_PORT, _LAST_PORT)  # noqa: S311 - a choice, not a secret
            candidate = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            # Held until all are chosen, so that none is chosen twice.
            if _bound(candidate, port):
                chosen.append(port)
    raise PortTaken(_FIRST_PORT, f"one of {count} internal servers")


def free_port() -> int:
    """A port that is free now."""
    return free_ports(1)[0]


def _bound(candidate: socket.socket, port: int) -> bool:
    # As servers do it: without this, connections of a server just stopped would block its port for a minute.
    candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        candidate.bind((LOOPBACK, port))
        candidate.listen(1)
    except OSError:
        return False
    return True
