"""The smallest part of a plan that still fails: Zeller and Hildebrandt's delta debugging (ddmin), over faults."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


async def shrink(whole: Sequence[T], fails: Callable[[Sequence[T]], Awaitable[bool]], *, tries: int) -> list[T]:
    """A part of `whole` for which `fails` came true, in its order, after `tries` calls of it at the most.

    What fails now and then only may be kept though it is not needed; the part that is returned did fail.
    """
    smallest, parts = list(whole), 2
    while len(smallest) >= 2 and tries > 0:
        for candidate in _candidates(smallest, parts):
            if tries <= 0:
                return smallest
            tries -= 1
            if await fails(candidate):
                # A part that fails alone is cut in halves again; a rest that fails keeps its pieces.
                parts = 2 if len(candidate) <= len(smallest) / parts + 1 else max(2, parts - 1)
                smallest = list(candidate)
                break
        else:
            if parts >= len(smallest):
                break
            parts = min(len(smallest), parts * 2)
    return smallest


def _candidates(whole: list[T], parts: int) -> list[list[T]]:
    """Each of the parts alone, then the whole without each of them."""
    bounds = [len(whole) * number // parts for number in range(parts + 1)]
    pieces = [(begin, end) for begin, end in pairwise(bounds) if begin < end]
    alone = [whole[begin:end] for begin, end in pieces]
    return alone + ([whole[:begin] + whole[end:] for begin, end in pieces] if parts > 2 else [])
