"""The walk-through that `orderflow demo` does: the program as processes of its own, watched through its log."""

from __future__ import annotations


class Missed(Exception):
    """What was expected did not happen in time; the text says what was seen instead."""
