"""TCP ports to listen on. Standard library only."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 10_000


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on. Raises OSError where there is none.

    Whoever asks binds it seconds later, so it is drawn from below the range that the kernel hands out to others, if
    there is room below it.
    """
    lowest_handed_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if lowest_handed_out <= _LOWEST + 100:
        return try_port(host, 0)
    for _ in range(50):
        port = random.SystemRandom().randrange(_LOWEST, lowest_handed_out)
        try:
            return try_port(host, port)
        except OSError as error:
            problem = error
    raise problem


def try_port(host: str, port: int) -> int:
    """`port` (0: one that the kernel chooses). Raises OSError when it cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return probe.getsockname()[1]
