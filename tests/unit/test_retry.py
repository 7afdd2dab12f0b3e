"""The retry policy: a table of decisions, and bounds that hold for every attempt."""

from __future__ import annotations

from datetime import timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.engine.outcome import Dead, Retry
from orderflow.engine.retry import OutcomeUnknown, Permanent, RetryPolicy

ERROR = RuntimeError("Payment gateway error: Insufficient funds")
UNKNOWN = OutcomeUnknown("no answer")
PERMANENT = Permanent("no such order")


@pytest.mark.parametrize(
    ("failures", "error", "expected"),
    [
        (1, ERROR, Retry),
        (2, ERROR, Retry),
        (3, ERROR, "Max retries exceeded (3)"),
        (4, ERROR, "Max retries exceeded (3)"),
        (1, UNKNOWN, Retry),
        (3, UNKNOWN, Retry),
        (1000, UNKNOWN, Retry),
        (1, PERMANENT, "no such order"),
        (3, PERMANENT, "no such order"),
    ],
)
def test_decisions(failures: int, error: BaseException, expected: type[Retry] | str) -> None:
    match RetryPolicy().decide(failures, error, Random(1)):
        case Retry(delay, kept):
            assert expected is Retry
            assert kept is error
            assert timedelta() <= delay <= timedelta(seconds=30)
        case Dead(reason, kept):
            assert reason == expected
            assert kept is error


@pytest.mark.parametrize(
    ("failures", "ceiling"), [(1, 0.2), (2, 0.4), (3, 0.8), (8, 25.6), (9, 30.0), (100, 30.0), (10**9, 30.0)]
)
def test_the_ceiling_doubles_up_to_the_cap(failures: int, ceiling: float) -> None:
    assert RetryPolicy().ceiling(failures) == pytest.approx(ceiling)


@given(
    failures=st.integers(1, 10**6),
    base=st.floats(0, 10),
    cap=st.floats(0, 3600),
    seed=st.integers(),
)
def test_the_delay_lies_between_nothing_and_the_ceiling(failures: int, base: float, cap: float, seed: int) -> None:
    policy = RetryPolicy(max_attempts=failures + 1, base=base, cap=cap)
    decision = policy.decide(failures, ERROR, Random(seed))
    assert isinstance(decision, Retry)
    assert policy.ceiling(failures) <= cap
    assert timedelta() <= decision.delay <= timedelta(seconds=policy.ceiling(failures)) + timedelta(microseconds=1)


def test_full_jitter_uses_the_whole_range() -> None:
    random = Random(7)
    delays = [RetryPolicy().decide(2, ERROR, random).delay.total_seconds() for _ in range(500)]  # type: ignore[union-attr]
    assert min(delays) < 0.02
    assert max(delays) > 0.38


@given(st.integers(1, 50), st.integers(0, 2**32))
def test_the_decision_follows_from_its_inputs_alone(failures: int, seed: int) -> None:
    policy = RetryPolicy()
    assert policy.decide(failures, ERROR, Random(seed)) == policy.decide(failures, ERROR, Random(seed))
