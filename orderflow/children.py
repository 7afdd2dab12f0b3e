"""What a process starts its children with: command line, settings, and a name for each worker."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Sequence
from typing import Final

from orderflow.settings import Role, Settings, environment_name

METRICS_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"


def child_command(role: Role) -> list[str]:
    """The command line of a process with this one role; everything else comes with its environment."""
    return [sys.executable, "-m", "orderflow", "run", "--role", role]


def child_environment(settings: Settings, *, port: int, metrics: str, sockets: Sequence[socket.socket] = ()) -> dict[str, str]:
    """Our own environment, and in it every setting: on a command line `ps` would show the passwords."""
    ours = {
        environment_name(name): _as_text(value)
        for name in Settings.model_fields
        if (value := getattr(settings, name)) is not None
    }
    ours |= {
        environment_name("http_port"): str(port),
        environment_name("http_sockets"): ",".join(str(one.fileno()) for one in sockets),
        environment_name("http_reuse_port"): "true",
        environment_name("dev_children"): "true",
        METRICS_VARIABLE: metrics,
    }
    # Names of settings are read in any case: one in small letters must not stand beside ours.
    return {name: value for name, value in os.environ.items() if name.upper() not in ours} | ours


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def worker_name(base: str, number: int) -> str:
    """The id of the worker with this number: `payment-worker-3` for the third of `payment-worker-1`."""
    return f"{re.sub(r'-[0-9]+$', '', base)}-{number}"
