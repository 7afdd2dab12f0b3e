"""What `doctor` looks at. A check that finds something wrong also says what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]

# Nothing that the doctor asks may take longer, in seconds: it is run when things hang.
LIMIT = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line: where it was looked, how it is, what was seen, and what to do (empty when all is well)."""

    about: str
    level: Level
    seen: str
    advice: str = ""


def ok(about: str, seen: str) -> Check:
    """All is well."""
    return Check(about, "ok", seen)


def warning(about: str, seen: str, advice: str) -> Check:
    """It works, and somebody should look."""
    return Check(about, "warning", seen, advice)


def problem(about: str, seen: str, advice: str) -> Check:
    """It does not work, or not as promised."""
    return Check(about, "problem", seen, advice)
