"""The watermark: whatever the order of completion, what is committed never passes a delivery that is not finished."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orderflow.engine.watermark import Watermark

# Rising offsets with gaps, as compaction and transaction markers leave them, and any order of completion.
offsets_and_completions = st.sets(st.integers(0, 10_000), min_size=1, max_size=80).flatmap(
    lambda offsets: st.tuples(st.just(sorted(offsets)), st.permutations(sorted(offsets)))
)


@given(offsets_and_completions)
def test_any_order_of_completion(case: tuple[list[int], list[int]]) -> None:
    offsets, completions = case
    watermark = Watermark()
    assert all(watermark.take(offset) for offset in offsets)
    unfinished = set(offsets)
    for offset in completions:
        watermark.finish(offset)
        unfinished.discard(offset)
        finished_before = [o for o in offsets if not unfinished or o < min(unfinished)]
        expected = finished_before[-1] + 1 if finished_before else None
        assert watermark.position == expected
        assert watermark.in_flight == len(unfinished)
    assert (watermark.position, watermark.held, watermark.in_flight) == (offsets[-1] + 1, 0, 0)


class Deliveries(RuleBasedStateMachine):
    """Deliveries are taken and finished in turns, and fetches go back, as after an error of the consumer."""

    @initialize(first=st.integers(0, 1000))
    def begin(self, first: int) -> None:
        self.watermark = Watermark()
        self.next = first
        self.taken: set[int] = set()
        self.unfinished: set[int] = set()
        self.highest = -1

    @rule(gap=st.integers(0, 3))
    def take(self, gap: int) -> None:
        offset = self.next + gap
        assert self.watermark.take(offset)
        self.taken.add(offset)
        self.unfinished.add(offset)
        self.next = offset + 1

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def take_again(self, data: st.DataObject) -> None:
        assert not self.watermark.take(data.draw(st.sampled_from(sorted(self.taken))))

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.unfinished)))
        self.watermark.finish(offset)
        self.unfinished.discard(offset)

    @invariant()
    def never_passes_an_unfinished_one(self) -> None:
        position = self.watermark.position
        if position is not None:
            assert all(offset >= position for offset in self.unfinished)
            assert position >= self.highest
            self.highest = position

    @invariant()
    def holds_what_is_open_and_nothing_more(self) -> None:
        head = min(self.unfinished, default=self.next)
        assert self.watermark.held == sum(offset >= head for offset in self.taken)
        assert self.watermark.in_flight == len(self.unfinished)


TestDeliveries = Deliveries.TestCase


def test_nothing_is_committed_before_anything_is_finished() -> None:
    watermark = Watermark()
    watermark.take(5)
    assert watermark.position is None


@pytest.mark.parametrize("begun", [0, 1, 41])
def test_a_slow_head_holds_the_watermark_and_lets_go_of_all_at_once(begun: int) -> None:
    watermark = Watermark()
    for offset in range(begun, begun + 100):
        watermark.take(offset)
    for offset in range(begun + 1, begun + 100):
        watermark.finish(offset)
    assert (watermark.position, watermark.held, watermark.in_flight) == (None, 100, 1)
    watermark.finish(begun)
    assert (watermark.position, watermark.held, watermark.in_flight) == (begun + 100, 0, 0)
