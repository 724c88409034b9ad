"""A port of our own, also where several sockets listen on it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from usameter_core.config import Address, ConfigError


@contextmanager
def reserved_address(listen: Address) -> Iterator[Address]:
    """The address with its port settled, and kept, for servers that listen with SO_REUSEPORT.

    On a taken port such a server would start all the same and get a part of the connections. The
    kernel tells a socket without the option; ours gets it once it is bound, which lets servers of
    this user in and nobody else. It never listens, so it gets no connection.

    Raises:
        ConfigError: The address cannot be listened on, or somebody does already.
    """
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family) as holder:
        # As servers do it: else connections of one that has just ended would block the port for a minute.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((listen.host, listen.port))
        except OSError as error:
            raise ConfigError(f"USAMETER_LISTEN: {listen} cannot be listened on: {error.strerror}") from None
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield Address(listen.host, holder.getsockname()[1])
