"""What a torture came to, as Markdown with a picture: when what was done, and what became of the orders meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape

from orderflow.audit import Finding
from orderflow.bench.chart import Panel, Series, document, scale
from orderflow.bench.load import Summary
from orderflow.explain import Story
from orderflow.torture.faults import Injected
from orderflow.torture.plan import Fault

WIDTH, CHART, ROW, NOTE = 960.0, 260.0, 16.0, 36.0
# The faults' names stand left of the chart, whose panel begins and ends so many pixels inside; their bars share its axis.
NAMES, LEFT, RIGHT = 250.0, 62.0, 16.0


@dataclass(slots=True)
class Report:
    """What a run came to. `problems` is empty when every promise was kept; `first` tells of the first one that was not."""

    seed: int
    plan: Sequence[Fault]
    injected: list[Injected] = field(default_factory=list)
    load: Summary = field(default_factory=Summary)
    # Placed by the clients of faults, beside the load.
    accepted_besides: int = 0
    states: dict[str, int] = field(default_factory=dict)
    settled_after: float | None = None
    # How often a process killed itself at each failpoint.
    killed_at: dict[str, int] = field(default_factory=dict)
    # (second of the load, orders placed in it, orders ended in it)
    over_time: list[tuple[int, int, int]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    first: Story | None = None

    @property
    def ended_meanwhile(self) -> int:
        """Orders that ended before the last fault did: what is done to orders that only wait shows little."""
        until = max((one.ended for one in self.injected), default=0.0)
        return sum(ended for second, _, ended in self.over_time if second < until)

    def document(self) -> dict[str, object]:
        """For JSON."""
        found = asdict(self)
        found["findings"] = [{**asdict(finding), "verdict": finding.verdict} for finding in self.findings]
        found["sound"] = not self.problems
        found["ended_meanwhile"] = self.ended_meanwhile
        return found

    def markdown(self, again: str, picture: str) -> str:
        """The report; `again` is the command that repeats the run, `picture` the name of the timeline's file."""
        kills, seams = sum(self.killed_at.values()), {name.rpartition(".")[0] for name in self.killed_at}
        accepted = self.load.accepted + self.accepted_besides
        lines = [
            f"# Torture, seed {self.seed}: {'sound' if not self.problems else 'VIOLATED'}", "",
            f"    {again}", "", f"![what was done, and what became of the orders]({picture})", "",
            f"{accepted:,} orders accepted ({counts(self.states)}), {self.ended_meanwhile:,} of them ended among the faults.",
            f"{len(self.injected)} faults, {kills:,} processes killed at {len(seams)} seams."
            + (f" Settled {self.settled_after:.1f} s after the load." if self.settled_after is not None else ""), "",
            *(f"- {problem}" for problem in self.problems), "",
            *_table(("invariant", "", "checked", "violations", ""), (
                (f.invariant, f.text, f"{f.checked:,}", f"{f.violations:,}", f.verdict) for f in self.findings)),
            *_table(("fault", "times", "seconds in all"), _summed(self.injected)),
            *_table(("planned", "began", "ended", "fault", "what it met"), (
                (f"{i.fault.at:.1f}", f"{i.began:.1f}", f"{i.ended:.1f}", i.fault.kind, i.what) for i in self.injected)),
            *_table(("failpoint", "kills"), ((name, str(count)) for name, count in self.killed_at.items())),
        ]  # fmt: skip
        return "\n".join(lines)

    def picture(self) -> str:
        """The timeline as SVG: orders placed and ended in each second, and below them each kind of fault at its times."""
        kinds = sorted(
            {i.fault.kind for i in self.injected}, key=lambda kind: min(i.began for i in self.injected if i.fault.kind == kind)
        )
        seconds = scale("seconds of the load", [*(float(at) for at, _, _ in self.over_time), *(i.ended for i in self.injected)])
        orders = scale("orders in a second", [float(n) for _, placed, ended in self.over_time for n in (placed, ended)])
        series = (
            Series("placed", [(float(at), float(placed)) for at, placed, _ in self.over_time]),
            Series("ended", [(float(at), float(ended)) for at, _, ended in self.over_time]),
        )
        panel = Panel("Orders, and what was done to them", seconds, orders, series, NAMES, 0, WIDTH, CHART)
        width = WIDTH - LEFT - RIGHT
        rows = []
        for row, kind in enumerate(kinds):
            y = CHART + row * ROW
            rows.append(f'<text class="soft" x="8" y="{y + 11:.1f}">{escape(kind)}</text>')
            for one in (i for i in self.injected if i.fault.kind == kind):
                begin, end = seconds.at(one.began) * width, seconds.at(one.ended) * width
                place = f'x="{NAMES + LEFT + begin:.1f}" y="{y:.1f}" width="{max(2.0, end - begin):.1f}" height="{ROW - 3:.0f}"'
                rows.append(f'<rect class="dot second" opacity="0.55" {place}/>')
        height = CHART + ROW * len(kinds) + NOTE
        return document([panel, _Rows(rows)], f"seed {self.seed}", width=NAMES + WIDTH, height=height)


@dataclass(frozen=True, slots=True)
class _Rows:
    parts: Sequence[str]

    def svg(self) -> str:
        """See Drawn."""
        return "<g>" + "".join(self.parts) + "</g>"


def counts(counts: dict[str, int]) -> str:
    """As in `3 PAID, 1 FAILED`."""
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def _summed(injected: Iterable[Injected]) -> list[tuple[str, str, str]]:
    times: dict[str, list[float]] = {}
    for one in injected:
        times.setdefault(one.fault.kind, []).append(one.ended - one.began)
    return [(kind, str(len(lasted)), f"{sum(lasted):.1f}") for kind, lasted in sorted(times.items())]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    found = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *found, ""] if found else []
