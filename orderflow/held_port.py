"""The HTTP port of many processes: the parent listens, every API process accepts.

Were each to listen by itself (SO_REUSEPORT), a process that ends would reset whoever waits in its queue. Like this a
connection waits for the next process that accepts, also while none of them lives.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator, Sequence
from typing import Final

from orderflow.engine.patience import Misconfigured

BACKLOG: Final = 1024


@contextlib.contextmanager
def held_port(host: str, port: int) -> Iterator[tuple[int, Sequence[socket.socket]]]:
    """Listen on every address of the host; yields the port's number (a free one for 0) and the sockets.

    Raises Misconfigured when something else listens there, or the address is not ours to use.
    """
    with contextlib.ExitStack() as stack:
        try:
            sockets: list[socket.socket] = []
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in dict.fromkeys(found):
                one = stack.enter_context(socket.socket(family, kind, protocol))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # It would take the port of IPv4 too, for which there may be a socket of its own.
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((address[0], port, *address[2:]))
                one.listen(BACKLOG)
                port = port or int(one.getsockname()[1])
                sockets.append(one)
        except OSError as error:
            raise Misconfigured(_port_error(host, port, error)) from error
        yield port, sockets


def _port_error(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is taken: stop what listens there, or set HTTP_PORT to another"
        case errno.EACCES | errno.EPERM:
            return f"port {port} on {host} may not be used by this user: set HTTP_PORT to one above 1023"
        case _:
            reason = error.strerror or error
            return f"cannot listen on {host}:{port}: {reason}; check ORDERFLOW_HTTP_HOST and HTTP_PORT"
