"""`orderflow bench` in its smallest form: it runs, sets each figure beside its reference, and audits. No figure is judged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import uuid
from pathlib import Path
from xml.etree import ElementTree

import asyncpg
import pytest

from orderflow.bench import bare, pipeline, reference, trickle
from orderflow.bench.extent import QUICK
from orderflow.bench.paced import OpenLoop, Options
from orderflow.bench.servers import Servers, Target
from orderflow.bench.suite import NAMES
from orderflow.bench.targets import lines
from orderflow.bench.trickle import Trickle
from tests import servers
from tests.programs import ROOT

TIMEOUT = 580.0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "orderflow", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def broker_option() -> list[str]:
    return [] if servers.choose_broker().kind == "kafka" else ["--embedded-broker"]


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_the_quick_form_of_everything_runs_and_audits(tmp_path: Path) -> None:
    written, drawn = tmp_path / "bench.json", tmp_path / "bench.svg"
    result = run("bench", "--quick", "--json", str(written), "--plot", str(drawn), *broker_option())
    assert result.returncode == 0, result.stderr
    report = json.loads(written.read_text())
    assert report["sound"] is True
    assert [audited["problems"] for audited in report["audits"]] == [[] for _ in report["audits"]]
    assert f"audit after each of {len(report['audits'])} runs: ok" in result.stdout
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert set(figures) >= {line.name for line in lines(QUICK)} - {"T8 memory"}
    assert {name.split()[0] for name in figures} == set(NAMES)
    assert [beside["reference"] for beside in figures["T1"]["beside"]] == ["B", "D"]
    assert report["details"]["T2"][0]["load"]["latencies"]["buckets"]
    assert report["costs"]["T2"]["cpu"]
    assert report["cpus"] >= 1
    assert report["postgresql"]
    assert report["command"].startswith("orderflow bench --quick")
    ElementTree.fromstring(drawn.read_text())


@pytest.mark.campaign
@pytest.mark.timeout(120)
def test_the_embedded_broker_is_named_in_the_output() -> None:
    result = run("bench", "T14", "--quick", "--embedded-broker")
    assert result.returncode == 0, result.stderr
    assert "mock: in memory, carries no durability claim" in result.stdout
    assert "T14 ready" in result.stdout


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


async def test_the_pipeline_of_groups_leaves_what_the_reference_leaves(connection: asyncpg.Connection) -> None:
    await pipeline.settle_group(connection, 7)
    row = await connection.fetchrow(
        """
        SELECT (SELECT count(*) FROM orders WHERE state = 'PAID' AND version = 3 AND cardinality(entered_at) = 3),
               (SELECT count(*) FROM outbox JOIN orders ON id = aggregate_id WHERE published_at IS NOT NULL),
               (SELECT count(*) FROM processed_events JOIN outbox USING (event_id) WHERE event_type = 'OrderCreated')
        """
    )
    assert row is not None
    assert tuple(row) == (7, 14, 7)


async def test_the_bare_application_answers_every_order(tmp_path: Path) -> None:
    answered = await bare.measure(tmp_path, seconds=0.2, connections=4, warm_up=0.1)
    assert answered.orders > 0
    assert answered.detail.answers == {"201": answered.orders}
    assert sum(answered.detail.accepted_over_time) == answered.orders


async def test_an_order_that_is_never_paid_is_told(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener answers every request with another order's id, and nobody has heard of those orders."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"}"):
                location = f"/orders/{uuid.uuid4()}"
                writer.write(f"HTTP/1.1 201 Created\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()

    monkeypatch.setattr("orderflow.bench.paced.on_end_of_input", lambda stop: None)
    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        record = str(tmp_path / "accepted")
        options = Options("127.0.0.1", port, database_url, 20.0, 0.2, record, connections=1, patience=0.3)
        paced = await OpenLoop(options).run()
    assert paced.answers == {"201": 4}
    assert (paced.unpaid, paced.followed, paced.paid["count"]) == (4, 4, 0)


@pytest.mark.timeout(120)
async def test_a_producer_right_after_the_commit_loses_nothing(
    database_url: str, kafka: servers.Broker, tmp_path: Path
) -> None:
    embedded = servers.choose_broker().kind != "kafka"
    servers_ = Servers(tmp_path, database_url=database_url, bootstrap=kafka.bootstrap)
    servers_.embedded_broker = embedded
    delivered, audited = await trickle.measure_reference(servers_, Trickle(50.0, 2, 0.5, 0.2))
    assert (delivered.sent, delivered.received, audited.problems) == (25, 25, [])
    assert delivered.from_commit["count"] == delivered.to_commit["count"] == 25
    assert delivered.from_due["max"] >= delivered.to_commit["p50"]


@pytest.mark.timeout(120)
async def test_a_server_that_is_named_is_left_as_it_was(database_url: str, connection: asyncpg.Connection) -> None:
    scratch = "SELECT count(*) FROM pg_database WHERE datname LIKE 'orderflow_bench%'"
    result = await asyncio.to_thread(
        run, "bench", "B", "--quick", "--seconds", "1", "--database-url", database_url, "--embedded-broker"
    )
    assert result.returncode == 0, result.stderr
    assert await connection.fetchval("SELECT count(*) FROM orders") == 0
    assert await connection.fetchval(scratch) == 0
    assert "app_password" not in result.stdout


def test_without_java_the_error_names_the_way_out(tmp_path: Path) -> None:
    # A cache without Kafka, and no program on PATH that could fetch or run it.
    result = subprocess.run(
        (sys.executable, "-m", "orderflow", "bench", "T14", "--quick"), cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False, env={"PATH": str(tmp_path), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "--embedded-broker" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_two_brokers_are_a_usage_error() -> None:
    assert run("bench", "--embedded-broker", "--kafka", "localhost:9092").returncode == 2
    assert run("bench", "E1").returncode == 2
