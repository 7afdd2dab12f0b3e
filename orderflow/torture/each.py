"""Each kind of fault alone: a run of its own for every kind, one after the other, on new servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orderflow.torture.driver import Extent
from orderflow.torture.plan import Kind, plan
from orderflow.torture.report import Report
from orderflow.torture.runs import Runs


async def each(
    kinds: Sequence[Kind], seed: int, every: float, extent: Extent, command: Callable[[Kind], str],
    *, embedded_broker: bool, keep: bool, tell: Callable[[float, str], None],
) -> list[tuple[Kind, Report, Runs]]:  # fmt: skip
    """The runs of all these kinds; one whose promises were not kept does not end the rest. `command` repeats one of them.

    Raises RunFailed.
    """
    found = []
    for number, kind in enumerate(kinds):

        def told(done: float, text: str, number: int = number, kind: Kind = kind) -> None:
            tell((number + done) / len(kinds), f"{number + 1} of {len(kinds)}, {kind}: {text}")

        runs = Runs(seed, plan(seed, extent.seconds, every=every, kinds=[kind]), extent, command(kind), embedded_broker, keep)
        found.append((kind, await runs.of(range(len(runs.plan)), told), runs))
    return found
