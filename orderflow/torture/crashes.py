"""Kills, errors, delays and lost answers at the program's own seams, by a plan that changes all the time.

Every process reads its failpoints from a file when it starts. The file says something else every half second, so each life of a
process has others. What stands there is a pure function of the seed and of how often it has changed.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from orderflow.engine import seams

CHANGE_SECONDS = 0.5
# Of each plan: so many seams that kill at their first passage after a rest, in seconds, up to which any is as likely. What
# every order passes is passed thousands of times a second when there is a backlog: passages counted from the start would kill
# whoever works on one before it comes anywhere. Whoever passes many of the seams has the longer rests, and lives ten seconds or
# so all the same; a killed worker stops its group until Kafka's session of 6 s has ended, and has the longest.
KILLING = 36
LONGEST_REST, LONGEST_PUBLISHER_REST, LONGEST_WORKER_REST = 20.0, 120.0, 400.0
# So many that kill at one of the first passages, for what belongs to a start; and so many that mislead.
EARLY = 2
LATEST_PASSAGE = 5
MISLEADING = 3
CHANCE = 0.02
DELAY_SECONDS = 0.3

OF_WORKERS = tuple(f"orderflow.{name}" for name in ("payments", "engine.consumer", "engine.executor", "engine.processed"))
OF_PUBLISHERS = ("orderflow.engine", "orderflow.retention", "orderflow.audit")

_CRASH = re.compile(rb"^failpoint (\S+): crash$")


class Crashes:
    """`names`: the seams that there are. `settings` leads the program's processes to the file."""

    def __init__(self, directory: Path, seed: int, names: Sequence[str]) -> None:
        self._file = directory / "failpoints"
        self._seed = seed
        self._names = sorted(names)
        self._write(plan_of(seed, 0, self._names))

    @property
    def settings(self) -> dict[str, str]:
        """For the program."""
        return {"ORDERFLOW_FAILPOINTS": f"@{self._file}", "ORDERFLOW_FAILPOINT_SEED": str(self._seed)}

    async def run(self) -> None:
        """Until it is cancelled; what starts after that starts unarmed."""
        turn = 0
        try:
            while True:
                await asyncio.sleep(CHANGE_SECONDS)
                turn += 1
                self._write(plan_of(self._seed, turn, self._names))
        finally:
            self._write("")

    def _write(self, plan: str) -> None:
        # In one step: a process that starts at this moment reads one plan or the other, and never half of one.
        fresh = self._file.with_suffix(".new")
        fresh.write_text(plan)
        os.replace(fresh, self._file)


def plan_of(seed: int, turn: int, names: Sequence[str]) -> str:
    """What stands in the file at that turn (from 0)."""
    random = Random(f"{seed} {turn}")
    misled = [name for name in names if name not in seams.owning()]

    def chosen(count: int, of: Sequence[str]) -> list[tuple[str, str]]:
        return [(name, random.choice(("before", "after"))) for name in random.sample(of, min(count, len(of)))]

    killing = [f"{name}.{where}=crash@1+{random.uniform(0, _longest_rest(name)):.1f}" for name, where in chosen(KILLING, names)]
    early = [f"{name}.{where}=crash@{int(2 ** random.uniform(0, LATEST_PASSAGE))}" for name, where in chosen(EARLY, names)]
    misleading = [
        f"{name}.{random.choice(('after=drop', 'before=raise', f'before=delay({DELAY_SECONDS})'))}%{CHANCE}"
        for name, _ in chosen(MISLEADING, misled)
    ]
    return "; ".join(killing + early + misleading)


def _longest_rest(name: str) -> float:
    module = seams.seams()[name].__module__
    if module.startswith(OF_WORKERS):
        return LONGEST_WORKER_REST
    return LONGEST_PUBLISHER_REST if module.startswith(OF_PUBLISHERS) else LONGEST_REST


def counted(log: Path) -> Counter[str]:
    """How often each failpoint has killed a process, by what each wrote with its last breath."""
    with log.open("rb") as lines:
        return Counter(found[1].decode() for line in lines if (found := _CRASH.match(line)))
