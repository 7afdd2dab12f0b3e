"""The changing plan of kills at seams: pure, readable by the program, swapped in one step, counted from the last breaths."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

import orderflow.app  # noqa: F401  (the seams are those of what has been imported)
from orderflow.engine import seams
from orderflow.torture.crashes import EARLY, KILLING, MISLEADING, Crashes, counted, plan_of

NAMES = sorted(seams.seams())


def test_the_plan_is_a_pure_function_of_seed_and_turn() -> None:
    assert plan_of(1, 0, NAMES) == plan_of(1, 0, NAMES)
    assert len({plan_of(seed, turn, NAMES) for seed in range(5) for turn in range(20)}) == 100


@pytest.mark.parametrize("turn", range(30))
def test_the_program_reads_every_plan(turn: int) -> None:
    points = seams.parse(plan_of(7, turn, NAMES))
    kinds = Counter((point.action == "crash", point.begins > 0) for point in points)
    assert kinds == {(True, True): KILLING, (True, False): EARLY, (False, False): MISLEADING}
    assert all(point.passage or point.share < 1.0 for point in points)


def test_in_time_every_seam_has_its_turn() -> None:
    killing = {
        point.name.rpartition(".")[0]
        for turn in range(300)
        for point in seams.parse(plan_of(3, turn, NAMES))
        if point.action == "crash" and point.passage
    }
    assert killing == set(NAMES)


async def test_the_file_changes_while_it_runs_and_is_empty_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderflow.torture.crashes.CHANGE_SECONDS", 0.001)
    crashes = Crashes(tmp_path, 5, NAMES)
    file = Path(crashes.settings["ORDERFLOW_FAILPOINTS"].removeprefix("@"))
    assert file.read_text() == plan_of(5, 0, NAMES)
    running = asyncio.create_task(crashes.run())
    seen: set[str] = set()
    async with asyncio.timeout(20):
        while len(seen) < 5:
            await asyncio.sleep(0.001)
            seen.add(file.read_text())
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert file.read_text() == ""
    assert seen - {""} <= {plan_of(5, turn, NAMES) for turn in range(20_000)}


def test_kills_are_counted_by_place(tmp_path: Path) -> None:
    log = tmp_path / "orderflow.log"
    log.write_text(
        '{"a":1}\nfailpoint relay.run_once.after: crash\nfailpoint x.y.before: crash\n{"b":2}\nfailpoint x.y.before: crash\n'
    )
    assert counted(log) == {"x.y.before": 2, "relay.run_once.after": 1}
