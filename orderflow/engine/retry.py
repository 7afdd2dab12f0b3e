"""Whether and when to try again: a pure function of the attempt and the error.

Exponential backoff with full jitter, as in Marc Brooker, "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015):
the delay is uniform between 0 and min(cap, base * 2 ** (failures - 1)).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from random import Random

from orderflow.engine.outcome import Dead, Retry


class Permanent(Exception):
    """Raised by a handler for what no retry can mend; the text becomes the dead letter's reason."""


class OutcomeUnknown(Exception):
    """Raised by a handler that cannot say what happened outside. Giving up is not allowed: it is tried until it is known."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits of retrying; times in seconds."""

    max_attempts: int = 3
    base: float = 0.2
    cap: float = 30.0

    def ceiling(self, failures: int) -> float:
        """The longest delay, in seconds, after that many failures (>= 1)."""
        return float(min(self.cap, self.base * 2 ** min(failures - 1, 62)))

    def decide(self, failures: int, error: BaseException, random: Random) -> Retry | Dead:
        """Retry or Dead after the given number of failed attempts, the one just failed included."""
        if isinstance(error, Permanent):
            return Dead(str(error), error)
        if failures >= self.max_attempts and not isinstance(error, OutcomeUnknown):
            return Dead(f"Max retries exceeded ({self.max_attempts})", error)
        return self.retry(failures, error, random)

    def retry(self, failures: int, error: BaseException, random: Random) -> Retry:
        """Retry, whatever the number of failures: for what must not be given up."""
        return Retry(timedelta(seconds=random.uniform(0, self.ceiling(failures))), error)
