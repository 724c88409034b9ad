"""TCP ports on 127.0.0.1: which are free, and a clear error for one that is not.

Between choosing a port and a server's listening on it seconds pass. So that two who choose at once get different
ports, whoever chooses one here claims it until its process ends.
"""

from __future__ import annotations

import random
import socket

from usameter_devstack.errors import HTTP_PORT_VARIABLE, PortTaken

LOOPBACK = "127.0.0.1"

# Below what Linux (32768) and macOS (49152) give to outgoing connections: no stranger's connection can take
# a port of ours between our looking and our server's binding it.
_FIRST_PORT = 20_000
_LAST_PORT = 29_999
_ATTEMPTS_MAX = 2_000
# By port, what claims it for this process: a UDP socket on the port of the same number, which servers on TCP do not
# need. The kernel gives it to one process only and takes it back when that ends, however it ends; a file would have
# to be writable for all users, and would know nothing of a container's own ports. Children do not inherit it.
_claims: dict[int, socket.socket] = {}


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now; another program may be faster."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as candidate:
        # As servers do it: without this, connections of a server just stopped would block its port for a minute.
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((LOOPBACK, port))
            candidate.listen(1)
        except OSError:
            return False
        return True


def check_port(port: int, what: str, *, variable: str | None = HTTP_PORT_VARIABLE) -> None:
    """Do nothing if `port` is free.

    Raises:
        PortTaken: It is not; the sentence says what wants it, and names the variable that changes it, if any.
    """
    if not port_is_free(port):
        raise PortTaken(port, what, variable=variable)


def claim_port(port: int) -> bool:
    """Whether `port` is free and now, or already, claimed by this process; it stays so until the process ends."""
    if port not in _claims:
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind((LOOPBACK, port))
        except OSError:
            claim.close()
            return False
        _claims[port] = claim
    return port_is_free(port)


def free_ports(count: int) -> list[int]:
    """`count` different ports, in random order, that are free and that no other call of this returns.

    They are claimed by this process until it ends; a server that one of them is for may be another process.

    Raises:
        PortTaken: Nearly all ports from 20000 to 29999 are in use.
    """
    chosen: list[int] = []
    for _ in range(_ATTEMPTS_MAX):
        if len(chosen) == count:
            return chosen
        port = random.randint(_FIRST_PORT, _LAST_PORT)  # noqa: S311 - a choice, not a secret
        if port not in _claims and claim_port(port):
            chosen.append(port)
    raise PortTaken(_FIRST_PORT, f"one of {count} internal servers")


def free_port() -> int:
    """A port that is free and claimed by this process; see `free_ports`."""
    return free_ports(1)[0]
