"""The suite: which benchmarks there are, in which order a round runs them, and what the rounds came to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from orderflow.bench import latency, reference, startup, throughput
from orderflow.bench.figures import Figure, best_of
from orderflow.bench.servers import Servers
from orderflow.bench.throughput import ONE_PROCESS, SPLITS, Audited, Throughput

NAMES: dict[str, str] = {
    "B": "reference: pgbench, one order's five transactions step by step",
    "E1": "end to end, HTTP to PAID, gateway 0 ms",
    "E4": "the same with the gateway at its default of 500 ms",
    "L1": "single orders at 20/s on an idle system",
    "S1": "start until ready, and --help",
}
# A ratio is worth something only when its reference was measured in the same run.
NEEDS: dict[str, tuple[str, ...]] = {"E1": ("B",), "E4": ("E1",)}
DEFAULT_DELAY_MS = 500


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to measure; times in seconds."""

    rounds: int = 3
    seconds: float = 15.0
    warm_up: float = 2.0
    connections: int = 256
    orders: int = 200


@dataclass(slots=True)
class Results:
    """What the rounds came to. `throughputs` are the runs behind E1 and E4, in the order in which they ran."""

    figures: list[Figure] = field(default_factory=list)
    audits: list[Audited] = field(default_factory=list)
    throughputs: list[Throughput] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Everything that makes the figures worthless."""
        return [f"{audited.run}: {problem}" for audited in self.audits for problem in audited.problems]


def with_needed(names: Iterable[str]) -> list[str]:
    """The benchmarks to run for these names, their references included, in the order of NAMES; all for none."""
    wanted = set(names) or set(NAMES)
    while more := {need for name in wanted for need in NEEDS.get(name, ())} - wanted:
        wanted |= more
    return [name for name in NAMES if name in wanted]


class Suite:
    """Runs the benchmarks round by round, alternating, so that a slow minute of the machine meets all of them.

    `tell` hears, before each measurement, how much of the whole is done (0 to 1), and what comes now.
    """

    def __init__(
        self, servers: Servers, directory: Path, names: Iterable[str], extent: Extent,
        tell: Callable[[float, str], None] = lambda done, text: None,
    ) -> None:  # fmt: skip
        self._servers = servers
        self._directory = directory
        self._names = with_needed(names)
        self._extent = extent
        self._tell = tell
        self._round = 0
        self._measured = 0
        self._measurements = extent.rounds * sum(len(SPLITS) if name == "E1" else 1 for name in self._names)
        self.results = Results()
        b = self._b = Figure("B", "pgbench -c 8, one order's five transactions", "orders/s")
        self._e1 = {split: Figure(f"E1 {split}", "HTTP to PAID, gateway 0 ms", "orders/s", [], b) for split in SPLITS}
        self._e4: Figure | None = None
        self._l1 = [
            Figure(f"L1 {what} {name}", text, "ms")
            for what, text in (("published", "transaction's start to Kafka's acknowledgement"), ("PAID", "HTTP POST to PAID"))
            for name in ("p50", "p99")
        ]
        self._s1 = [
            Figure("S1 ready", "`orderflow run` to 200 on /readyz", "s"), Figure("S1 help", "`orderflow --help`", "s"),
        ]  # fmt: skip

    async def run(self) -> Results:
        """All rounds. Raises EmbeddedError, ProgramFailed."""
        steps = {"B": self._run_b, "E1": self._run_e1, "E4": self._run_e4, "L1": self._run_l1, "S1": self._run_s1}
        for number in range(1, self._extent.rounds + 1):
            self._round = number
            for name in self._names:
                await steps[name]()
        figures = [self._b, *self._e1.values()]
        if "E1" in self._names:
            figures.append(best_of("E1", list(self._e1.values())))
        figures += [*([self._e4] if self._e4 else []), *self._l1, *self._s1]
        self.results.figures = [figure for figure in figures if figure.values]
        return self.results

    def _say(self, what: str) -> None:
        self._tell(self._measured / self._measurements, f"round {self._round} of {self._extent.rounds}: {what}")
        self._measured += 1

    async def _run_b(self) -> None:
        self._say("B, pgbench")
        async with self._servers.fresh() as target:
            self._b.values.append(await reference.measure(self._servers, target, self._directory, seconds=self._extent.seconds))

    async def _throughput(self, split: str, delay_ms: int) -> float:
        extent = self._extent
        run = await throughput.measure(
            self._servers, self._directory, split=split, delay_ms=delay_ms, seconds=extent.seconds,
            connections=extent.connections, warm_up=extent.warm_up,
        )  # fmt: skip
        self.results.throughputs.append(run)
        self.results.audits.append(run.audited)
        return run.orders_per_second

    async def _run_e1(self) -> None:
        for split, figure in self._e1.items():
            self._say(f"E1 in {split}")
            figure.values.append(await self._throughput(split, 0))

    async def _run_e4(self) -> None:
        if self._e4 is None:
            # The split that won the first round, in every round: one thing is compared with itself.
            split = max(SPLITS, key=lambda name: self._e1[name].values[0])
            self._e4 = Figure(f"E4 {split}", "HTTP to PAID, gateway 500 ms", "orders/s", [], self._e1[split])
        split = self._e4.name.removeprefix("E4 ")
        self._say(f"E4 in {split}")
        self._e4.values.append(await self._throughput(split, DEFAULT_DELAY_MS))

    async def _run_l1(self) -> None:
        self._say("L1, single orders")
        found = await latency.measure(self._servers, self._directory, split=ONE_PROCESS, orders=self._extent.orders)
        self.results.audits.append(found.audited)
        values = [latency.percentile(of, share) for of in (found.published, found.paid) for share in (0.5, 0.99)]
        for figure, value in zip(self._l1, values, strict=True):
            figure.values.append(value)

    async def _run_s1(self) -> None:
        self._say("S1, start")
        self._s1[0].values.append(await startup.seconds_to_ready(self._servers, self._directory))
        self._s1[1].values.append(await startup.seconds_to_help())
