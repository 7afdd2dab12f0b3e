"""A fair share of the shards: none is left over, and no relay holds more than it must."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.engine.outbox import SHARDS
from orderflow.engine.shards import fair_share


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_shares_cover_every_shard_and_one_less_would_not(relays: int, shards: int) -> None:
    share = fair_share(relays, shards)
    assert share * relays >= shards
    assert (share - 1) * relays < shards


@pytest.mark.parametrize(("relays", "share"), [(1, SHARDS), (2, 16), (3, 11), (4, 8), (SHARDS, 1), (100, 1)])
def test_shares_of_ours(relays: int, share: int) -> None:
    assert fair_share(relays) == share


def test_a_relay_that_cannot_see_its_own_sign_of_life_yet_still_takes_them_all() -> None:
    assert fair_share(0) == SHARDS
