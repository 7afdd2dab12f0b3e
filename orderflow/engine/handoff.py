"""From a writer to the relay of its own process: a wake-up, and what it has just committed.

A relay that waits for work need not read back from PostgreSQL what was committed beside it: it publishes what it is handed, and
reads after that. The row stays what counts. What is not handed over, or is lost with the process, is found by reading, as
everything is that other processes write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from orderflow.engine.message import Message

# More than this is read as fast as it is handed over.
MOST = 100


class Handoff:
    """One for a process. `woken` is set whenever there may be due rows."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self._wanted = False
        self._messages: list[Message] = []

    @property
    def is_wanted(self) -> bool:
        """Whether a relay waits for what is committed next."""
        return self._wanted

    def committed(self, messages: Callable[[], Sequence[Message]]) -> None:
        """Wake the relay. `messages` makes what was committed, and is called only when a relay waits for it.

        Each has to be the first event of its aggregate: what is handed over is published before anything that is due already.
        """
        if self._wanted and len(self._messages) < MOST:
            self._messages.extend(messages())
        self.woken.set()

    @contextmanager
    def wanted(self, everything: bool) -> Iterator[list[Message]]:
        """For the time in which a relay has nothing to do; the list is what it has been handed by the end.

        `everything`: it owns all shards. A relay that owns some of them cannot tell which of the messages are its own.
        """
        self._messages = []
        self._wanted = everything
        try:
            yield self._messages
        finally:
            # From here on the relay reads, and what is committed now is found: handed over as well, it would go out twice.
            self._wanted = False
