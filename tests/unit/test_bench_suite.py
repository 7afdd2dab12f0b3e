"""The suite: what is run for which names, in which order, and what it tells meanwhile; the open loop's arrivals."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from orderflow.bench import suite
from orderflow.bench.arrivals import arrive
from orderflow.bench.context import Bench
from orderflow.bench.extent import QUICK, Extent
from orderflow.bench.program import ProgramFailed
from orderflow.bench.suite import NAMES, NEEDS, STEPS, Suite, with_needed
from orderflow.bench.throughput import ONE_PROCESS
from orderflow.commands import bench as command


def test_the_names_are_those_of_the_command_and_each_has_a_step() -> None:
    assert tuple(NAMES) == command.NAMES
    assert set(STEPS) == set(NAMES)
    assert {need for needs in NEEDS.values() for need in needs} <= set(NAMES)


def test_a_benchmark_brings_its_references_along_and_comes_after_them() -> None:
    assert with_needed(["T5"]) == ["C", "T5"]
    assert with_needed(["T4"]) == ["B", "D", "T2", "T1", "T4"]
    assert with_needed(["T7", "A"]) == ["A", "T7"]
    every = with_needed([])
    assert sorted(every) == sorted(NAMES)
    assert all(every.index(need) < every.index(name) for name, needs in NEEDS.items() for need in needs)


async def test_rounds_alternate_and_tell_how_far_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[int, str]] = []

    def step(name: str) -> Any:
        async def measured(bench: Bench) -> None:
            ran.append((bench.round, name))
            bench.say(name)
            for figure in {"T2": ("T2",), "T10": ("T10", "T10 before")}.get(name, ()):
                bench.take(figure, 1.0 * bench.round)

        return measured

    monkeypatch.setattr(suite, "STEPS", {name: step(name) for name in NAMES})
    told: list[tuple[float, str]] = []
    extent = replace(QUICK, rounds=2)
    names = ["T2", "T10"]
    results = await Suite(cast(Any, None), tmp_path, names, extent, lambda done, text: told.append((done, text))).run()
    first = with_needed(names)
    # T10 has rounds of its own.
    assert ran == [*((1, name) for name in first), *((2, name) for name in first if name != "T10")]
    assert [done for done, _ in told] == pytest.approx([n / len(ran) for n in range(len(ran))])
    assert told[0][1] == "round 1 of 2: B"
    assert results.figures["T2"].values == {1: 1.0, 2: 2.0}
    assert results.figures["T10"].values == {1: 1.0}
    assert [figure.name for figure in results.measured] == ["T2", "T10 before", "T10"]


@pytest.mark.parametrize(("rates", "best"), [((3.0, 2.0, 1.0), ONE_PROCESS), ((1.0, 2.0, 1.5), "three processes")])
async def test_the_split_that_wins_the_first_round_is_measured_in_every_round(
    rates: tuple[float, ...], best: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    by_split = dict(zip(suite.benchmarks.SPLITS, rates, strict=True))

    async def throughput(self: Bench, benchmark: str, split: str, **_: object) -> Any:
        asked.append(split)
        return type("Run", (), {"orders_per_second": by_split[split]})

    async def reference(bench: Bench) -> None:
        """B and D are not asked for here."""

    monkeypatch.setattr(Bench, "throughput", throughput)
    monkeypatch.setattr(suite, "STEPS", {**STEPS, "B": reference, "D": reference})
    results = await Suite(cast(Any, None), tmp_path, ["T1"], replace(Extent(), rounds=2)).run()
    assert results.split == best
    assert results.figures["T1"].values == {1: max(rates), 2: max(rates)}
    again = [ONE_PROCESS] if best == ONE_PROCESS else [ONE_PROCESS, best]
    assert asked == [*by_split, *again]


async def test_arrivals_are_due_at_fixed_times_whatever_happens() -> None:
    due: list[float] = []
    seen: list[float] = []

    def arrived(at: float) -> None:
        due.append(at)
        seen.append(time.monotonic())
        if len(due) == 10:
            # A stall, as a garbage collection would be one: those that arrive meanwhile are late, and are due when they were.
            time.sleep(0.05)

    await arrive(500.0, 0.1, arrived)
    assert len(due) == 50
    steps = [later - earlier for earlier, later in pairwise(due)]
    assert steps == pytest.approx([1 / 500] * 49)
    assert all(at <= now for at, now in zip(due, seen, strict=True))
    assert seen[10] - due[10] > 0.03


async def test_what_fails_ends_only_what_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[int, str]] = []

    def step(name: str) -> Any:
        async def measured(bench: Bench) -> None:
            ran.append((bench.round, name))
            if (bench.round, name) == (1, "B"):
                raise ProgramFailed("pgbench gave no figure")

        return measured

    monkeypatch.setattr(suite, "STEPS", {name: step(name) for name in NAMES})
    results = await Suite(cast(Any, None), tmp_path, ["T4", "T7"], replace(QUICK, rounds=2)).run()
    assert results.problems == ["B, round 1 of 2: pgbench gave no figure"]
    assert ran == [(1, "B"), (1, "D"), (1, "T7"), *((2, name) for name in ("B", "D", "T2", "T1", "T4", "T7"))]


async def test_an_interruption_leaves_what_was_measured_by_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    began = asyncio.Event()

    async def measured(bench: Bench) -> None:
        bench.take("B", 100.0)

    async def endless(bench: Bench) -> None:
        began.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(suite, "STEPS", {**STEPS, "B": measured, "D": endless})
    running = asyncio.create_task(Suite(cast(Any, None), tmp_path, ["B", "D"], QUICK).run())
    await began.wait()
    running.cancel()
    results = await running
    assert not running.cancelling()
    assert [figure.name for figure in results.measured] == ["B"]
    assert results.problems == ["D, round 1 of 1: interrupted; the figures are what was measured by then"]
