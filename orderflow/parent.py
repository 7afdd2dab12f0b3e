"""The other half of `processes`, in each child: tell the parent that we are up, and end when it does."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from threading import Thread

MARGIN_SECONDS = 2.0


def watch_parent(grace: float, descriptor: int = 0) -> None:
    """Drain when the parent ends, however it ends; `grace` as in `supervise`, in seconds.

    Standard input is a pipe that only the parent holds open: its end is the parent's. From then on this process
    has `grace` and two seconds to live. A thread watches, so that a blocked event loop leaves no orphan.
    """
    Thread(target=_wait_for_the_end, args=(grace, descriptor), name="watch-parent", daemon=True).start()


def tell_parent(descriptor: int | None) -> None:
    """Say once that all roles are up; a parent that has ended does not hear it."""
    if descriptor is not None:
        with suppress(OSError):
            os.write(descriptor, b"\n")
            os.close(descriptor)


def _wait_for_the_end(grace: float, descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            continue
    except OSError:
        pass  # no usable pipe, no parent: the same as its end
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace + MARGIN_SECONDS)
    os._exit(1)
