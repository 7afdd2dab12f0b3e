"""Outcomes and what decides them: frozen types, errors that pass or do not, and the pure rules of a delivery."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import timedelta
from random import Random
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.engine.outcome import Dead, Done, Duplicate, Postponed, Retry
from orderflow.engine.patience import (
    DependencyUnavailable,
    Misconfigured,
    Patience,
    database_error,
    is_transient,
    wait_until,
)
from orderflow.engine.processed import Known
from orderflow.engine.retry import OutcomeUnknown, Permanent, RetryPolicy
from orderflow.payments.gateway import idempotency_key

POLICY = RetryPolicy()


@pytest.mark.parametrize(
    "outcome", [Done(), Duplicate(), Retry(timedelta(0), ValueError()), Postponed(timedelta(0)), Dead("why")]
)
def test_an_outcome_cannot_be_changed(outcome: Done | Duplicate | Retry | Postponed | Dead) -> None:
    for name in [field.name for field in dataclasses.fields(outcome)] or ["anything"]:
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
            setattr(outcome, name, None)


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.booleans(), st.booleans(), st.integers(1, 10_000))
def test_a_delivery_is_fresh_only_when_nothing_has_decided_it(
    attempt: int, first: int, processed: bool, buried: bool, delivered: int
) -> None:
    known = Known("OrderCreated", uuid4(), attempt, first, processed, buried)
    assert known.is_fresh(delivered) == (not processed and not buried and delivered >= attempt)


@given(st.integers(1, 100_000), st.integers(0, 2**32))
def test_what_is_not_known_is_never_given_up(failures: int, seed: int) -> None:
    decided = POLICY.decide(failures, OutcomeUnknown("?"), Random(seed))
    assert isinstance(decided, Retry)
    assert timedelta(0) <= decided.delay <= timedelta(seconds=POLICY.cap)


@given(st.integers(1, 100_000), st.integers(0, 2**32))
def test_what_no_retry_can_mend_is_given_up_at_once_with_its_own_reason(failures: int, seed: int) -> None:
    error = Permanent("no such thing")
    assert POLICY.decide(failures, error, Random(seed)) == Dead("no such thing", error)


@pytest.mark.parametrize(
    ("failures", "reason"), [(1, None), (2, None), (3, "Max retries exceeded (3)"), (4, "Max retries exceeded (3)")]
)
def test_three_attempts(failures: int, reason: str | None) -> None:
    decided = POLICY.decide(failures, ValueError("no"), Random(1))
    assert (decided.reason if isinstance(decided, Dead) else None) == reason


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (DependencyUnavailable("away"), True),
        (asyncpg.ConnectionDoesNotExistError("gone"), True),
        (asyncpg.AdminShutdownError("restarting"), True),
        (asyncpg.CannotConnectNowError("starting"), True),
        (asyncpg.DeadlockDetectedError("met"), True),
        (asyncpg.QueryCanceledError("too slow"), True),
        (asyncpg.ReadOnlySQLTransactionError("failover"), True),
        (asyncpg.TooManyConnectionsError("full"), True),
        (asyncpg.InterfaceError("connection is closed"), True),
        (asyncpg.DataError("an argument of the wrong type"), False),
        (asyncpg.exceptions.UntranslatableCharacterError("NUL"), False),
        (asyncpg.CheckViolationError("illegal"), False),
        (asyncpg.UndefinedTableError("no schema"), False),
        (Misconfigured("wrong"), False),
        (ValueError("a bug"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_which_errors_pass(error: Exception, passes: bool) -> None:
    assert is_transient(error) is passes


URL = "postgresql://me:s3cret@db.example:6543/shop"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (asyncpg.InvalidPasswordError("x"), Misconfigured, ["'me'", "DATABASE_URL", "db.example:6543"]),
        (asyncpg.InvalidCatalogNameError("x"), Misconfigured, ["'shop'", "DATABASE_URL"]),
        (ConnectionRefusedError("refused"), DependencyUnavailable, ["cannot be reached", "DATABASE_URL"]),
        (TimeoutError(), DependencyUnavailable, ["does not answer"]),
        (asyncpg.TooManyConnectionsError("x"), DependencyUnavailable, ["max_connections", "ORDERFLOW_DATABASE_POOL_SIZE"]),
        (asyncpg.CannotConnectNowError("starting up"), DependencyUnavailable, ["starting up"]),
        (asyncpg.FeatureNotSupportedError("odd"), Misconfigured, ["odd"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_database_error_in_one_line_that_shows_no_password(error: Exception, kind: type[Exception], words: list[str]) -> None:
    found = database_error(URL, error)
    assert type(found) is kind
    assert all(word in str(found) for word in words)
    assert "s3cret" not in str(found)
    assert "\n" not in str(found)


async def test_patience_ends_with_the_first_error_that_does_not_pass() -> None:
    errors: list[Exception] = [TimeoutError(), ConnectionResetError(), ValueError("a bug"), TimeoutError()]

    async def action() -> None:
        raise errors.pop(0)

    with pytest.raises(ValueError, match="a bug"):
        await Patience(seconds=None, pause=0.0001).run(action)
    assert len(errors) == 1


async def test_patience_that_is_over_raises_the_last_error() -> None:
    tries = []

    async def action() -> None:
        tries.append(None)
        raise TimeoutError(len(tries))

    with pytest.raises(TimeoutError):
        await Patience(seconds=0.02, pause=0.001, longest_pause=0.002).run(action)
    assert len(tries) > 1
    with pytest.raises(TimeoutError):
        await Patience().run(action)


async def test_waiting_says_each_new_reason_once() -> None:
    reasons = ["a", "a", "b", None]
    said: list[str] = []

    async def attempt() -> str:
        reason = reasons.pop(0)
        if reason is not None:
            raise DependencyUnavailable(reason)
        return "up"

    assert await wait_until(attempt, timeout=30, waiting=said.append) == "up"
    assert said == ["a", "b"]


async def test_waiting_is_cancelled_at_once() -> None:
    async def attempt() -> None:
        raise DependencyUnavailable("away")

    said = asyncio.Event()
    task = asyncio.create_task(wait_until(attempt, timeout=3600, waiting=lambda _: said.set()))
    await asyncio.wait_for(said.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


@given(st.uuids())
def test_the_idempotency_key_is_the_order_s_and_nothing_else_s(order_id: object) -> None:
    assert idempotency_key(order_id) == f"orderflow-charge-{order_id}"  # type: ignore[arg-type]
