"""What is counted: Prometheus names and labels, alone and over several processes, and the METRICS line."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orderflow.engine import telemetry
from orderflow.engine.telemetry import PROCESS, PUBLISHER, WORKER, emit, observe
from orderflow.metrics import MOST_LABELS, Metrics, Totals, metrics_line
from orderflow.settings import load
from tests.programs import Program

LIMIT = 10.0


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metrics]:
    made = Metrics()
    monkeypatch.setattr(telemetry, "_observers", [made.observe])
    with telemetry.subscribed(made.take):
        yield made


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize(
    ("event", "fields", "name", "labels"),
    [
        ("EVENT_PUBLISHED", {"eventType": "OrderPaid"}, "orderflow_events_published_total", {"event_type": "OrderPaid"}),
        ("EVENT_RECEIVED", {"eventType": "OrderPaid"}, "orderflow_events_received_total", {}),
        ("EVENT_PROCESSED", {}, "orderflow_events_processed_total", {}),
        ("DUPLICATE_EVENT", {}, "orderflow_duplicates_skipped_total", {}),
        ("PAYMENT_RESULT", {"status": "SUCCESS"}, "orderflow_payments_total", {"status": "SUCCESS"}),
        ("PAYMENT_RESULT", {"status": "DECLINED"}, "orderflow_payments_total", {"status": "DECLINED"}),
        ("PAYMENT_GIVEN_UP", {}, "orderflow_payments_total", {"status": "GIVEN_UP"}),
        ("RETRY_SCHEDULED", {}, "orderflow_retries_total", {}),
        ("DLQ_EVENT", {}, "orderflow_dead_letters_total", {}),
        ("ROLE_CRASHED", {"role": "worker"}, "orderflow_role_crashes_total", {"role": "worker"}),
    ],
)
def test_a_fact_is_counted(metrics: Metrics, event: str, fields: dict[str, Any], name: str, labels: dict[str, str]) -> None:
    for _ in range(3):
        emit(WORKER, event, **fields)
    assert value(metrics, name, **labels) == 3


def test_dropped_lines_are_added_up(metrics: Metrics) -> None:
    emit(PROCESS, "LOG_LINES_DROPPED", lines=40)
    emit(PROCESS, "LOG_LINES_DROPPED", lines=2)
    assert value(metrics, "orderflow_log_lines_dropped_total") == 42


def test_facts_that_nobody_counts_pass(metrics: Metrics) -> None:
    emit(WORKER, "STATE_CHANGE", oldState="CREATED")


def test_foreign_event_types_do_not_make_endless_series(metrics: Metrics) -> None:
    for number in range(MOST_LABELS * 3):
        emit(PUBLISHER, "EVENT_PUBLISHED", eventType=f"Foreign{number}")
    emit(PUBLISHER, "EVENT_PUBLISHED", eventType="Foreign0")
    assert value(metrics, "orderflow_events_published_total", event_type="Foreign0") == 2
    assert value(metrics, "orderflow_events_published_total", event_type="other") == MOST_LABELS * 2


def test_stages_are_histograms_in_seconds(metrics: Metrics) -> None:
    for seconds in (0.0004, 0.003, 0.003, 120.0, -0.5):
        observe("charged", seconds)
    observe("unheard of", 1.0)
    assert value(metrics, "orderflow_stage_seconds_count", stage="charged") == 5
    assert value(metrics, "orderflow_stage_seconds_sum", stage="charged") == pytest.approx(120.0064)
    assert value(metrics, "orderflow_stage_seconds_bucket", stage="charged", le="0.001") == 2
    assert value(metrics, "orderflow_stage_seconds_bucket", stage="charged", le="0.005") == 4
    assert value(metrics, "orderflow_stage_seconds_bucket", stage="charged", le="60.0") == 4
    assert value(metrics, "orderflow_stage_seconds_count", stage="accepted") == 0


def test_requests_are_counted_by_route(metrics: Metrics) -> None:
    for status in (201, 201, 422):
        metrics.count_request("POST", "/orders", status)
    metrics.count_request("BREW", "/orders", 405)
    name = "orderflow_http_requests_total"
    assert value(metrics, name, method="POST", route="/orders", status="201") == 2
    assert value(metrics, name, method="POST", route="/orders", status="422") == 1
    assert value(metrics, name, method="other", route="/orders", status="405") == 1


async def test_the_metrics_line_comes_regularly_and_at_the_end() -> None:
    lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    totals = Totals()
    stopping = asyncio.Event()

    def collect(service: str, event: str, fields: dict[str, Any]) -> None:
        if event == "METRICS":
            assert service == WORKER
            lines.put_nowait(fields)

    with telemetry.subscribed(totals.take), telemetry.subscribed(collect):
        line = asyncio.create_task(metrics_line(load(metrics_interval_seconds=0.01, worker_id="w"), totals, stopping))
        first = await asyncio.wait_for(lines.get(), LIMIT)
        assert first == {
            "workerId": "w", "eventsProcessed": 0, "duplicatesSkipped": 0, "paymentsSuccess": 0, "paymentsFailed": 0,
            "retriedEvents": 0, "dlqEvents": 0,
        }  # fmt: skip
        for _ in range(7):
            emit(WORKER, "EVENT_PROCESSED")
        for status in ("SUCCESS", "SUCCESS", "SUCCESS", "DECLINED"):
            emit(WORKER, "PAYMENT_RESULT", status=status)
        emit(WORKER, "PAYMENT_GIVEN_UP")
        emit(WORKER, "DUPLICATE_EVENT")
        emit(WORKER, "RETRY_SCHEDULED")
        emit(WORKER, "RETRY_SCHEDULED")
        emit(WORKER, "DLQ_EVENT")
        stopping.set()
        await asyncio.wait_for(line, LIMIT)
    while not lines.empty():
        last = lines.get_nowait()
    assert last == {
        "workerId": "w", "eventsProcessed": 7, "duplicatesSkipped": 1, "paymentsSuccess": 3, "paymentsFailed": 2,
        "retriedEvents": 2, "dlqEvents": 1,
    }  # fmt: skip


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_last_metrics_line_comes_whatever_the_interval(cancelled: bool) -> None:
    seen = []
    stopping = asyncio.Event()
    with telemetry.subscribed(lambda _service, event, _fields: seen.append(event)):
        line = asyncio.create_task(metrics_line(load(metrics_interval_seconds=3600.0), Totals(), stopping))
        await asyncio.sleep(0)
        if cancelled:
            line.cancel()
        else:
            stopping.set()
        await asyncio.wait({line}, timeout=LIMIT)
    assert line.done()
    assert seen == ["METRICS"]


async def test_a_worker_that_begins_again_and_again_does_not_repeat_itself() -> None:
    seen = []
    totals = Totals()
    ended = asyncio.Event()
    ended.set()
    with telemetry.subscribed(lambda _service, event, _fields: seen.append(event)):
        for _ in range(5):
            await metrics_line(load(metrics_interval_seconds=3600.0), totals, ended)
    assert seen == ["METRICS"]


SCRAPED = """
from orderflow import metrics
assert "prometheus_client" not in sys.modules
from orderflow.engine.telemetry import PUBLISHER, emit, observe
from orderflow.settings import load
metrics.count_request("GET", "/livez", 200)
metrics.install(load())
metrics.count_request("GET", "/livez", 200)
for number in range(int(sys.argv[1])):
    emit(PUBLISHER, "EVENT_PUBLISHED", eventType="OrderPaid")
    observe("published", 0.02)
tell("COUNTED")
sys.stdin.read()
text, kind = metrics.render()
tell("RENDERED", text=text.decode(), kind=kind)
"""


def samples(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(number) for name, number in pairs}


def test_one_process_shows_its_own_counts_and_itself() -> None:
    with Program(SCRAPED, "3") as program:
        rendered = program.until("RENDERED")
    assert rendered["kind"].startswith("text/plain")
    found = samples(rendered["text"])
    assert found['orderflow_events_published_total{event_type="OrderPaid"}'] == 3
    assert found['orderflow_http_requests_total{method="GET",route="/livez",status="200"}'] == 1
    assert found['orderflow_stage_seconds_bucket{le="0.025",stage="published"}'] == 3
    assert found["process_resident_memory_bytes"] > 0
    assert any(name.startswith("orderflow_build_info{") for name in found)


def test_any_process_of_several_shows_the_counts_of_all(tmp_path: Path) -> None:
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    with (
        Program(SCRAPED, "3", environment=shared) as gone,
        Program(SCRAPED, "4", environment=shared, stdin=subprocess.PIPE) as asked,
        Program(SCRAPED, "5", environment=shared, stdin=subprocess.PIPE) as other,
    ):
        assert gone.end() == 0
        asked.until("COUNTED")
        other.until("COUNTED")
        assert asked.process.stdin is not None
        asked.process.stdin.close()
        found = samples(asked.until("RENDERED")["text"])
    # A process that has ended took part, and a counter must not go back.
    assert found['orderflow_events_published_total{event_type="OrderPaid"}'] == 12
    assert found['orderflow_stage_seconds_count{stage="published"}'] == 12
    assert [number for name, number in found.items() if name.startswith("orderflow_build_info{")] == [1.0]
