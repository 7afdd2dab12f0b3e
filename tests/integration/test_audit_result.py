"""The auditor's latest result in a process that is not the elected one: when somebody asks, and at no answer's cost."""

from __future__ import annotations

import asyncpg
import pytest

from orderflow import audit_result
from orderflow.audit_result import LatestAudit
from orderflow.engine.patience import DependencyUnavailable
from orderflow.health import POSTGRES, Health
from tests.serving import Wire
from tests.waiting import eventually


def reaching(up: bool = True) -> Health:
    """The health of a process that has found PostgreSQL so."""
    health = Health()
    health.set(POSTGRES, up)
    return health


def violations(health: Health) -> int | None:
    return health.audited["violations"] if health.audited else None


async def test_what_one_process_has_noted_another_shows(connection: asyncpg.Connection, database_url: str) -> None:
    health = reaching()
    await LatestAudit(database_url, health).refresh()
    assert "audit" not in health.snapshot()
    noted = await audit_result.note(connection, 7, {"I1": 2, "I3": 1})
    await LatestAudit(database_url, health).refresh()
    assert health.snapshot()["audit"] == noted
    assert noted | {"at": None, "process": None} == {
        "violations": 3, "byInvariant": {"I1": 2, "I3": 1}, "orders": 7, "at": None, "process": None
    }  # fmt: skip
    assert noted["at"] == await connection.fetchval("SELECT audited_at FROM audit_result")
    again = await audit_result.note(connection, 8, {"I1": 0, "I3": 0})
    assert (again["violations"], again["orders"]) == (0, 8)
    assert again["at"] > noted["at"]
    assert await connection.fetchval("SELECT count(*) FROM audit_result") == 1


async def test_whoever_asks_again_at_once_is_told_the_same(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    health = reaching()
    latest = LatestAudit(database_url, health)
    await audit_result.note(connection, 7, {"I1": 1})
    await latest.refresh()
    await audit_result.note(connection, 7, {"I1": 2})
    await latest.refresh()
    assert violations(health) == 1
    monkeypatch.setattr(audit_result, "FRESH_SECONDS", 0.0)
    await latest.refresh()
    assert violations(health) == 2


async def test_an_answer_does_not_wait_for_it_and_the_next_one_has_it(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_result, "TIMEOUT_SECONDS", 60.0)
    await audit_result.note(connection, 7, {"I1": 1})
    health = reaching()
    latest = LatestAudit(database_url, health)
    async with connection.transaction():
        await connection.execute("LOCK TABLE audit_result")
        for _ in range(2):
            await latest.refresh()
            assert violations(health) is None
    await eventually(lambda: violations(health) == 1, what="the look that waited is shown")


async def test_nothing_that_goes_wrong_reaches_who_asks(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_result, "FRESH_SECONDS", 0.0)
    await audit_result.note(connection, 7, {"I1": 1})
    async with Wire(database_url) as wire:
        health = reaching()
        latest = LatestAudit(wire.url, health)
        wire.cut = True
        await latest.refresh()
        wire.cut = False
        await connection.execute("REVOKE SELECT ON audit_result FROM app_user")
        await latest.refresh()
        assert violations(health) is None
        await connection.execute("GRANT SELECT ON audit_result TO app_user")
        await latest.refresh()
        assert violations(health) == 1


async def test_a_server_that_is_away_is_not_asked(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(url: str, *, timeout: float, application: str) -> asyncpg.Connection:
        raise DependencyUnavailable("asked all the same")

    monkeypatch.setattr(audit_result, "connect", connect)
    latest = LatestAudit(database_url, reaching(False))
    await latest.refresh()
    assert latest._look is None
