"""Where the benchmarks of a round measure, and where they leave what they found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orderflow.bench import throughput
from orderflow.bench.extent import Extent
from orderflow.bench.results import Results
from orderflow.bench.servers import Servers, Target
from orderflow.bench.throughput import Throughput


@dataclass(slots=True)
class Bench:
    """What every benchmark is given.

    `split` is the one that won the first round: what follows T1 runs in it, and so does T1 in the later rounds, so that one
    thing is compared with itself. `stack` holds what lasts for several rounds.
    """

    servers: Servers
    directory: Path
    extent: Extent
    results: Results
    stack: AsyncExitStack
    say: Callable[[str], None] = lambda what: None
    round: int = 1
    split: str | None = None
    publishers: int | None = None
    filled: Target | None = None

    @property
    def best_split(self) -> str:
        """For what follows T1."""
        assert self.split is not None
        return self.split

    def take(self, figure: str, value: float) -> None:
        """This round's value of that figure."""
        self.results.figures[figure].values[self.round] = value

    def value(self, figure: str) -> float:
        """What was taken in this round."""
        return self.results.figures[figure].values[self.round]

    def under_load(self) -> dict[str, Any]:
        """The load, as all that measure throughput take it."""
        return {"seconds": self.extent.seconds, "connections": self.extent.connections, "warm_up": self.extent.warm_up}

    async def throughput(
        self, benchmark: str, split: str, *, delay_ms: int = 0, settings: Mapping[str, str] | None = None,
        target: Target | None = None,
    ) -> Throughput:  # fmt: skip
        """One run from POST to PAID, kept under that name."""
        self.say(f"{benchmark}, {split}")
        run = await throughput.measure(
            self.servers, self.directory, split=split, delay_ms=delay_ms, settings=settings, target=target, **self.under_load()
        )
        self.results.keep(benchmark, run, [run.audited])
        return run
