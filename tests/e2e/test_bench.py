"""`orderflow bench` in its smallest form: it runs, sets each figure beside its reference, and audits. No figure is judged."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from orderflow.bench import reference
from orderflow.bench.figures import Figure, best_of
from orderflow.bench.latency import percentile
from orderflow.bench.reference import orders_per_second
from orderflow.bench.servers import Servers, Target
from orderflow.bench.suite import with_needed
from tests import servers
from tests.programs import ROOT

TIMEOUT = 280.0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "orderflow", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def broker_option() -> list[str]:
    return [] if servers.choose_broker().kind == "kafka" else ["--embedded-broker"]


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_the_quick_form_runs_prints_ratios_and_audits(tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    result = run("bench", "--quick", "--seconds", "1", "--json", str(written), *broker_option())
    assert result.returncode == 0, result.stderr
    report = json.loads(written.read_text())
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert {"B", "E1", "E1 one process", "E1 three processes", "L1 published p50", "L1 PAID p99", "S1 ready"} <= set(figures)
    assert figures["E1"]["reference"] == "B"
    assert figures["E1"]["ratio"]["median"] > 0
    (delayed,) = [figure for name, figure in figures.items() if name.startswith("E4 ")]
    assert delayed["reference"].startswith("E1 ")
    assert delayed["ratio"]["median"] > 0
    assert all(run["orders"] > 0 for run in report["runs"])
    assert [audited["problems"] for audited in report["audits"]] == [[]] * 4
    assert report["sound"] is True
    assert report["cpus"] >= 1
    assert report["postgresql"]
    assert report["command"].startswith("orderflow bench --quick")
    assert f"{figures['E1']['ratio']['median']:.2f}" in result.stdout
    assert "audit after each of 4 runs: ok" in result.stdout


@pytest.mark.timeout(120)
def test_the_embedded_broker_is_named_in_the_output() -> None:
    result = run("bench", "S1", "--quick", "--embedded-broker")
    assert result.returncode == 0, result.stderr
    assert "mock: in memory, carries no durability claim" in result.stdout
    assert "S1 ready" in result.stdout


async def test_the_reference_does_what_an_order_needs(
    database_url: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    servers_ = Servers(tmp_path, database_url=database_url, bootstrap="127.0.0.1:1")
    target = Target(database_url, "127.0.0.1:1", "unused", embedded_broker=True)
    assert await reference.measure(servers_, target, tmp_path, seconds=1) > 0
    # A client that is cut off by the end of the time leaves its order where it was.
    unfinished = await connection.fetchval("SELECT count(*) FROM orders WHERE state <> 'PAID'")
    assert unfinished <= reference.CLIENTS
    orders = await connection.fetchval("SELECT count(*) FROM orders")
    published = await connection.fetchval("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL")
    processed = await connection.fetchval("SELECT count(*) FROM processed_events")
    assert orders > 0
    assert 2 * (orders - unfinished) - reference.CLIENTS <= published <= 2 * orders
    assert processed == orders - unfinished


@pytest.mark.timeout(120)
async def test_a_server_that_is_named_is_left_as_it_was(database_url: str, connection: asyncpg.Connection) -> None:
    scratch = "SELECT count(*) FROM pg_database WHERE datname LIKE 'orderflow_bench%'"
    result = await asyncio.to_thread(
        run, "bench", "B", "--quick", "--seconds", "1", "--database-url", database_url, "--embedded-broker"
    )
    assert result.returncode == 0, result.stderr
    assert await connection.fetchval("SELECT count(*) FROM orders") == 0
    assert await connection.fetchval(scratch) == 0


def test_without_java_the_error_names_the_way_out(tmp_path: Path) -> None:
    # A cache without Kafka, and no program on PATH that could fetch or run it.
    result = subprocess.run(
        (sys.executable, "-m", "orderflow", "bench", "S1", "--quick"), cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False, env={"PATH": str(tmp_path), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "--embedded-broker" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_two_brokers_are_a_usage_error() -> None:
    assert run("bench", "--embedded-broker", "--kafka", "localhost:9092").returncode == 2
    assert run("bench", "E9").returncode == 2


def test_a_benchmark_brings_its_references_along() -> None:
    assert with_needed(["E4"]) == ["B", "E1", "E4"]
    assert with_needed(["L1"]) == ["L1"]
    assert with_needed([]) == ["B", "E1", "E4", "L1", "S1"]


def test_a_ratio_is_taken_round_by_round() -> None:
    reference = Figure("B", "", "orders/s", [100.0, 50.0, 200.0])
    slow = Figure("E1 slow", "", "orders/s", [100.0, 100.0, 100.0], reference)
    fast = Figure("E1 fast", "", "orders/s", [300.0, 200.0, 400.0], reference)
    assert fast.ratio is not None
    assert (fast.ratio.median, fast.ratio.low, fast.ratio.high) == (3.0, 2.0, 4.0)
    assert reference.ratio is None
    best = best_of("E1", [slow, fast])
    assert best.values == fast.values
    assert best.ratio == fast.ratio


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([1.0], 0.5, 1.0), ([1.0], 0.99, 1.0), ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0), (list(map(float, range(1, 201))), 0.99, 198.0)],
)
def test_percentiles_are_values_that_occurred(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_the_figure_of_pgbench_is_read_from_its_output() -> None:
    said = "number of failed transactions: 0 (0.000%)\ntps = 1025.430000 (without initial connection time)\n"
    assert orders_per_second(said) == 1025.43
    with pytest.raises(Exception, match="no figure"):
        orders_per_second(said.replace("transactions: 0", "transactions: 7"))
    with pytest.raises(Exception, match="no figure"):
        orders_per_second("pgbench: error")
