"""Ports on the loopback address: is the wanted one free, and if not, which one is."""

from __future__ import annotations

import contextlib
import secrets
import socket

HOST = "127.0.0.1"
# Below the range that Linux (32768) and macOS (49152) give to outgoing connections: a server that a test
# restarts must get its port back, and no client's connection may have taken it meanwhile.
FIRST, LAST = 15_000, 31_999
CONNECT_TIMEOUT = 0.5


def is_free(port: int) -> bool:
    """Whether a server may listen on 127.0.0.1:port and `localhost` leads to that server alone."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    # macOS lets us bind beside a server on the wildcard address; and `localhost` may mean ::1 to a client
    # first.
    return not _answers(socket.AF_INET, HOST, port) and not _answers(socket.AF_INET6, "::1", port)


def _answers(family: socket.AddressFamily, host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT)
        return probe.connect_ex((host, port)) == 0
    return False


def choose(preferred: int | None) -> int:
    """`preferred` where it is free, else any free port."""
    if preferred is not None and is_free(preferred):
        return preferred
    return free_port()


def claim(preferred: int | None) -> tuple[int, socket.socket]:
    """As `choose`, for whoever listens some time later: nobody else who claims gets the same port while the socket is open.

    The claim is a UDP socket of the same number, which is in no TCP server's way.
    """
    while True:
        port = choose(preferred)
        held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            held.bind((HOST, port))
            return port, held
        except OSError:
            held.close()
            preferred = None


def free_port() -> int:
    """A port that nobody listens on at this moment; whoever uses it must be ready to lose a race for it."""
    while not is_free(port := FIRST + secrets.randbelow(LAST - FIRST)):
        pass
    return port
