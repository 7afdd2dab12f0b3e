"""Every statement, send and charge has a seam; off it is nothing, armed it does what the plan says, the same for a seed."""

from __future__ import annotations

import ast
import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import orderflow.app
from orderflow.engine import seams, telemetry
from orderflow.engine.patience import is_transient
from orderflow.engine.seams import BadPlan, ConnectionLost, Failpoint, arm, name_of, parse, seam
from orderflow.payments import redrive

PACKAGE = Path(orderflow.app.__file__).parent
ROOMS = ("engine", "orders", "payments")
# What leaves the process: PostgreSQL, Kafka, the gateway.
LEAVES = {"fetch", "fetchrow", "fetchval", "execute", "executemany", "send_batch", "send_and_wait", "commit", "charge", "find"}
# Whose callers have the seam, or that ask for nothing that could be lost.
EXEMPT = {
    "postgres": "the connection itself: whoever calls it has the seam",
    "http._probe": "asks whether PostgreSQL is there",
    "dead_letters.newest": "reads for a command",
    "dead_letters.matching": "reads for a command",
}

calls: list[int] = []


@seam
async def probe(number: int) -> int:
    calls.append(number)
    return number * 2


class Probing:
    """With a seam that is a method."""

    @seam
    async def probe_method(self, number: int) -> int:
        calls.append(number)
        return number + 1


@pytest.fixture(autouse=True)
def nothing_called() -> Iterator[None]:
    calls.clear()
    yield
    assert "with_failpoints" not in probe.__qualname__


def functions() -> Iterator[tuple[str, ast.AsyncFunctionDef]]:
    for room in ROOMS:
        for path in sorted((PACKAGE / room).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.AsyncFunctionDef):
                    yield path.stem, node


def own_nodes(function: ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    """What stands in the function, and not in a function inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.AsyncFunctionDef))


def test_whatever_leaves_the_process_has_a_seam() -> None:
    missing = []
    for module, function in functions():
        leaving = {
            node.func.attr for node in own_nodes(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEAVES
        }  # fmt: skip
        marked = any(isinstance(one, ast.Name) and one.id in ("seam", "owning_seam") for one in function.decorator_list)
        if leaving and not marked and not {module, f"{module}.{function.name}"} & EXEMPT.keys():
            missing.append(f"{module}.{function.name}: {', '.join(sorted(leaving))}")
    assert missing == []


def test_no_seam_is_imported_by_name_where_arming_would_not_reach_it() -> None:
    names = {(function.__module__, function.__name__) for function in seams.seams().values()}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not {(node.module, alias.name) for alias in node.names} & names, f"{path.name}: {ast.unparse(node)}"


def test_there_are_more_than_a_hundred_places_and_no_two_share_a_name() -> None:
    found = seams.seams()
    assert len(found) * 2 >= 100
    assert all(name_of(function) == name for name, function in found.items())
    assert redrive.__name__ in sys.modules
    with pytest.raises(ValueError, match=r"two seams are named test_seams\.probe"):
        seam(probe)


async def test_off_a_seam_is_the_function_itself() -> None:
    assert await probe(1) == 2
    assert seams.seams()[name_of(probe)] is probe


@pytest.mark.parametrize("where", ["before", "after"])
async def test_an_error_at_the_nth_passage_and_at_no_other(where: str) -> None:
    facts: list[dict[str, Any]] = []
    disarm = arm(f"test_seams.probe.{where}=raise@2")
    try:
        assert await probe_now()(1) == 2
        with (
            telemetry.subscribed(lambda _, event, told: facts.extend(told) if event == "FAILPOINT" else None),
            pytest.raises(ConnectionLost) as raised,
        ):
            await probe_now()(2)
        assert await probe_now()(3) == 6
    finally:
        disarm()
    assert is_transient(raised.value)
    assert calls == ([1, 3] if where == "before" else [1, 2, 3])
    assert facts == [{"name": f"test_seams.probe.{where}", "action": "raise", "passage": 2}]
    assert probe_now() is probe


async def test_until_its_time_has_come_nothing_happens_and_no_passage_counts() -> None:
    (point,) = parse("test_seams.probe.before=raise@2+1000")
    assert 900 < point.begins - time.monotonic() <= 1000
    for _ in range(3):
        await point.pass_by(Random(1))
    point.begins = time.monotonic()
    await point.pass_by(Random(1))
    with pytest.raises(ConnectionLost):
        await point.pass_by(Random(1))


def probe_now() -> Callable[[int], Any]:
    return sys.modules[__name__].probe  # type: ignore[no-any-return]


async def test_an_answer_is_dropped_after_the_work_was_done() -> None:
    disarm = arm("test_seams.probe_method.after=drop")
    try:
        with pytest.raises(ConnectionLost):
            await Probing().probe_method(4)
    finally:
        disarm()
    assert calls == [4]
    assert await Probing().probe_method(5) == 6


async def test_a_delay_delays_and_changes_nothing() -> None:
    disarm = arm("test_seams.probe.before=delay(0.05)")
    try:
        begun = time.monotonic()
        assert await probe_now()(1) == 2
        assert time.monotonic() - begun >= 0.05
    finally:
        disarm()


@pytest.mark.parametrize("seed", [1, 2])
async def test_chance_is_the_same_for_the_same_seed(seed: int) -> None:
    async def passages() -> list[bool]:
        point, random, failed = Failpoint("x.y.before", "raise", share=0.3), Random(seed), []
        for _ in range(200):
            try:
                await point.pass_by(random)
            except ConnectionLost:
                failed.append(True)
            else:
                failed.append(False)
        return failed

    first = await passages()
    assert first == await passages()
    assert 30 <= sum(first) <= 90


def test_a_crash_is_a_kill() -> None:
    program = (
        "import asyncio; from orderflow.engine.seams import arm; from orderflow.engine import outbox\n"
        "arm('outbox.next_due.before=crash@1')\n"
        "asyncio.run(outbox.next_due(None, []))"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=30, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ("test_seams.probe.before=explode", "explode is none of crash, raise, delay, drop"),
        ("test_seams.probe.before=drop", "drop is of after only"),
        ("test_seams.probe.between=crash", "must read seam.before=action"),
        ("test_seams.nowhere.after=crash", "there is no seam test_seams.nowhere"),
        ("test_seams.probe.after=raise@0", "must read"),
        ("test_seams.probe.after=raise%2", "must read"),
        ("crash", "must read"),
        ("shards.balance.after=drop; shards._session.after=drop", "shards._session can only crash or be delayed"),
    ],
)
def test_a_plan_that_says_nothing_is_refused(plan: str, complaint: str) -> None:
    with pytest.raises(BadPlan) as refused:
        arm(f"test_seams.probe.after=delay; {plan}")
    assert complaint in str(refused.value)
    assert probe_now() is probe


def test_a_plan_is_read_as_it_is_written() -> None:
    points = parse(" test_seams.probe.after=delay(0.5)%0.01; test_seams.probe.before=crash@3 ;")
    assert points == [
        Failpoint("test_seams.probe.after", "delay", None, 0.01, 0.5), Failpoint("test_seams.probe.before", "crash", 3),
    ]  # fmt: skip


async def test_two_failpoints_of_a_seam_are_passed_in_order() -> None:
    disarm = arm("test_seams.probe.before=raise@1; test_seams.probe.before=delay(0.001); test_seams.probe.after=raise@1")
    try:
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(probe_now()(1), 5)
        assert await probe_now()(2) == 4
    finally:
        disarm()
