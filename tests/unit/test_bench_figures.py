"""Figures, ratios and targets: what is divided by what, and what is said of it."""

from __future__ import annotations

import pytest

from orderflow.bench.cost import Cost, Counters
from orderflow.bench.document import costs
from orderflow.bench.extent import QUICK, Extent
from orderflow.bench.figures import Comparison, Figure, at_least, at_most
from orderflow.bench.reference import orders_per_second
from orderflow.bench.results import Reference, Results
from orderflow.bench.targets import figures, lines
from orderflow.bench.usage import Usage


def figure(*values: float, name: str = "T", first: int = 1) -> Figure:
    return Figure(name, "", "orders/s", values=dict(enumerate(values, first)))


def test_a_ratio_is_taken_round_by_round() -> None:
    reference = figure(100.0, 50.0, 200.0)
    fast = figure(300.0, 200.0, 400.0)
    ratio = Comparison(reference, None).ratio(fast)
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)


def test_only_rounds_that_have_both_count() -> None:
    comparison = Comparison(figure(100.0, 50.0, 10.0), None)
    once = figure(200.0, first=2)
    ratio = comparison.ratio(once)
    assert ratio is not None
    assert (ratio.median, comparison.reference_median(once)) == (4.0, 50.0)
    assert comparison.ratio(figure(1.0, first=9)) is None
    assert Comparison(figure(0.0), None).ratio(figure(1.0)) is None


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (at_least(5, ">= 5"), 5.0, "met"), (at_least(5, ">= 5"), 4.99, "missed"),
        (at_most(9, "<= 9"), 9.0, "met"), (at_most(9, "<= 9"), 9.01, "missed"),
    ],
)  # fmt: skip
def test_a_target_judges_the_median(target: object, value: float, verdict: str) -> None:
    judged = figure(0.0, value, 100.0)
    judged.target = target  # type: ignore[assignment]
    assert judged.as_json()["verdict"] == verdict
    assert Comparison(figure(1.0, 1.0, 1.0), judged.target).as_json(figure(0.0, value, 100.0))["verdict"] == verdict


@pytest.mark.parametrize("extent", [Extent(), QUICK])
def test_every_line_is_declared_once_and_set_beside_one_that_is_there(extent: Extent) -> None:
    declared = list(lines(extent))
    names = [line.name for line in declared]
    assert len(set(names)) == len(names)
    assert {reference for line in declared for reference, _ in line.beside} <= set(names)
    assert list(figures(extent)) == names


def test_every_target_of_the_suite_has_its_line() -> None:
    # The figures that the targets are about, in full extent: T1 to T17 and nothing left out.
    judged = {line.name.split()[0] for line in lines(Extent()) if line.target or any(target for _, target in line.beside)}
    assert judged == {f"T{number}" for number in range(1, 18)}


def test_costs_are_medians_an_order_by_process() -> None:
    def run(orders: float, *seconds: float, wal: float) -> Reference:
        usage = [Usage(name, 1, cpu, 10) for name, cpu in zip(("api", "worker", "worker"), seconds, strict=True)]
        return Reference(orders, 1.0, usage, cost=Cost(wal, 0.1, None))

    details = {"T1": [run(1000, 0.1, 0.2, 0.3, wal=1.0), run(1000, 0.3, 0.2, 0.5, wal=3.0)], "T7": ["no run under load"]}
    assert costs(Results({}, details)) == {
        "T1": {
            "cpu": {"api": pytest.approx(200), "worker": pytest.approx(600)}, "peak": {"api": 10, "worker": 10},
            "cost": {"wal_bytes": 2.0, "commits": 0.1},
        }
    }  # fmt: skip


def test_our_own_commits_are_no_cost_of_an_order() -> None:
    cost = Cost.between(Counters(1000, 50, 7), Counters(3000, 80, None), orders=10, ours=10)
    assert cost == Cost(200.0, 2.0, None)


def test_the_figure_of_pgbench_is_read_from_its_output() -> None:
    said = "number of failed transactions: 0 (0.000%)\ntps = 1025.430000 (without initial connection time)\n"
    assert orders_per_second(said) == 1025.43
    with pytest.raises(Exception, match="no figure"):
        orders_per_second(said.replace("transactions: 0", "transactions: 7"))
    with pytest.raises(Exception, match="no figure"):
        orders_per_second("pgbench: error")
