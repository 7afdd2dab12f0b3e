"""Plans that fail are cut down to what makes them fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from orderflow.torture.shrink import shrink


def failing_with(needed: set[int]) -> tuple[Callable[[Sequence[int]], object], list[Sequence[int]]]:
    tried: list[Sequence[int]] = []

    async def fails(part: Sequence[int]) -> bool:
        tried.append(part)
        return needed <= set(part)

    return fails, tried


@given(st.data())
async def test_what_is_left_is_exactly_what_is_needed(data: st.DataObject) -> None:
    whole = list(range(data.draw(st.integers(1, 40))))
    needed = data.draw(st.sets(st.sampled_from(whole), min_size=1))
    fails, _ = failing_with(needed)
    assert await shrink(whole, fails, tries=10_000) == sorted(needed)  # type: ignore[arg-type]


async def test_it_ends_with_its_tries_and_returns_what_has_failed() -> None:
    fails, tried = failing_with({3, 30})
    left = await shrink(range(40), fails, tries=9)  # type: ignore[arg-type]
    assert len(tried) == 9
    assert {3, 30} <= set(left)
    assert len(left) < 40


async def test_what_fails_by_chance_only_is_kept_whole() -> None:
    async def never(part: Sequence[int]) -> bool:
        return False

    assert await shrink([1, 2, 3], never, tries=100) == [1, 2, 3]
