"""Wait for a condition instead of sleeping: the one place where tests poll."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

T = TypeVar("T")
INTERVAL = 0.01


async def eventually(condition: Callable[[], Awaitable[T] | T], timeout: float = 10.0, *, what: str | None = None) -> T:
    """Call `condition` (sync or async) until what it returns is true, and return that.

    Fails the test after `timeout` seconds, naming `what` (default: the condition's name) and the last result.
    An AssertionError inside the condition counts as "not yet" and is shown when the time is over.
    """
    deadline = time.monotonic() + timeout
    last: object = None
    while True:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                result = condition()
                value = await result if inspect.isawaitable(result) else result
            if value:
                return value
            last = value
        except AssertionError as error:
            last = error
        except TimeoutError:
            last = "it did not return"
        if time.monotonic() >= deadline:
            name = what or getattr(condition, "__qualname__", repr(condition))
            pytest.fail(f"not within {timeout:g} s: {name} (last: {last!r})")
        await asyncio.sleep(INTERVAL)
