"""The state machine by itself; tests/integration/test_store.py holds it against the database's own rules."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.orders.model import TERMINAL, Failure, IllegalTransition, State, may_go, path_to, transition

failures = st.sampled_from([None, *Failure])


@given(st.lists(st.tuples(st.sampled_from(State), failures), max_size=12))
def test_a_path_follows_from_its_end_and_its_length(wishes: list[tuple[State, Failure | None]]) -> None:
    state, version, walked = State.CREATED, 1, [State.CREATED]
    for wanted, failure in wishes:
        if may_go(state, wanted, failure):
            state, version = transition(state, version, wanted, failure)
            walked.append(state)
            assert version == len(walked)
            assert path_to(state, version) == walked


@given(st.sampled_from(State), st.integers(1, 9), st.sampled_from(State), failures)
def test_a_transition_is_one_step_or_none(old: State, version: int, new: State, failure: Failure | None) -> None:
    if may_go(old, new, failure):
        assert transition(old, version, new, failure) == (new, version + 1)
    else:
        with pytest.raises(IllegalTransition):
            transition(old, version, new, failure)


@given(st.sampled_from(State), st.integers(1, 9))
def test_every_path_is_made_of_legal_steps(state: State, version: int) -> None:
    try:
        path = path_to(state, version)
    except IllegalTransition:
        return
    assert path[0] is State.CREATED
    assert path[-1] is state
    assert len(path) == version
    assert all(may_go(old, new, Failure.ERROR) for old, new in itertools.pairwise(path))


def test_what_the_contract_says() -> None:
    assert path_to(State.PAID, 3) == [State.CREATED, State.PAYMENT_PENDING, State.PAID]
    assert path_to(State.FAILED, 3) == [State.CREATED, State.PAYMENT_PENDING, State.FAILED]
    assert path_to(State.FAILED, 2) == [State.CREATED, State.FAILED]
    assert not may_go(State.CREATED, State.PAID)
    assert may_go(State.FAILED, State.PAYMENT_PENDING, Failure.ERROR)
    assert not may_go(State.FAILED, State.PAYMENT_PENDING, Failure.DECLINED)
    assert not any(may_go(State.PAID, new) for new in State)
    assert {State.PAID, State.FAILED} == TERMINAL


@pytest.mark.parametrize(
    ("state", "version"), [("CREATED", 2), ("PAYMENT_PENDING", 1), ("PAID", 1), ("PAID", 2), ("FAILED", 1)]
)
def test_some_ends_have_no_path(state: str, version: int) -> None:
    with pytest.raises(IllegalTransition):
        path_to(State(state), version)
