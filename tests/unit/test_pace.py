"""Rest between rounds: none on an idle machine, bounded on a busy one, and soon forgotten."""

from __future__ import annotations

import pytest

from orderflow.engine import pace
from orderflow.engine.pace import FACTOR, FORGET_SECONDS, MOST_RELAYS, MOST_SECONDS, STALE_SECONDS, USUAL, Pace


class Clock:
    """time.monotonic() by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def noted(*seconds: float) -> Pace:
    found = Pace()
    for took in seconds:
        found.note(took)
    return found


def test_nothing_rests_before_the_first_round_nor_after_usual_ones(clock: Clock) -> None:
    assert Pace().rest() == 0.0
    assert noted(0.003).rest() == 0.0
    assert noted(0.003, 0.003 * USUAL).rest() == 0.0
    assert noted(0.003, 0.010, 0.002).rest() == 0.0


def test_a_slow_round_rests_by_how_slow_it_was_and_never_for_long(clock: Clock) -> None:
    assert noted(0.002, 0.010).rest() == pytest.approx(FACTOR * (0.010 - USUAL * 0.002))
    assert noted(0.002, 5.0).rest() == MOST_SECONDS


def test_of_several_relays_each_rests_for_all_and_never_for_long(clock: Clock) -> None:
    found = noted(0.002, 0.010)
    assert found.rest(2.0) == pytest.approx(2.0 * found.rest())
    assert found.rest(32.0) == pytest.approx(MOST_RELAYS * found.rest())
    assert noted(0.002, 5.0).rest(3.0) == pytest.approx(3.0 * MOST_SECONDS)


def test_an_idle_time_leaves_no_rest_for_what_comes_first_after_it(clock: Clock) -> None:
    found = noted(0.002, 0.010)
    clock.now += STALE_SECONDS * 1.01
    assert found.rest() == 0.0


def test_what_has_become_slower_for_good_is_usual_after_some_time(clock: Clock) -> None:
    found = noted(0.002)
    rests = []
    for _ in range(100):
        clock.now += FORGET_SECONDS / 20
        found.note(0.010)
        rests.append(found.rest())
    assert rests[0] > 0.0
    assert rests[-1] == 0.0
