"""`orderflow torture`: a short one from a fixed seed keeps every promise; and what its parts do by themselves."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from orderflow.bench.load import Options, Record, order_body
from orderflow.bench.persistent import PersistentClients
from orderflow.bench.sending import accepted_ids
from orderflow.commands.torture import _kinds, torture
from orderflow.torture.faults import Faults
from orderflow.torture.plan import LASTING, OF_KAFKA, SHORTEST_GAP, Kind, plan
from orderflow.torture.promises import PROMISES
from orderflow.torture.stage import Measured, Promise, Stage, measured
from orderflow.torture.victims import Victim, Victims, descendants, listed
from tests import servers
from tests.programs import ROOT

TIMEOUT = 280.0


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_a_short_torture_keeps_every_promise() -> None:
    broker = [] if servers.choose_broker().kind == "kafka" else ["--embedded-broker"]
    command = ("torture", "--seed", "3", "--seconds", "45", "--rate", "100", "--at-seams", "--json", *broker)
    result = subprocess.run(
        (sys.executable, "-m", "orderflow", *command), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert result.returncode == 0, result.stderr + result.stdout[-3000:]
    report = json.loads(result.stdout)
    assert report["sound"] is True
    assert [finding["verdict"] for finding in report["findings"]] == ["ok"] * 7
    assert report["load"]["accepted"] > 0
    assert sum(report["states"].values()) >= report["load"]["accepted"]
    assert len(report["injected"]) == len(report["plan"]) == len(plan(3, 45.0, kinds=_kinds([], bool(broker))))
    assert len(report["plan"]) >= 15
    assert report["killed_at"]
    assert sum(placed for _, placed, _ in report["over_time"]) == sum(report["states"].values())


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_kinds_of_faults_are_done_each_alone() -> None:
    broker = [] if servers.choose_broker().kind == "kafka" else ["--embedded-broker"]
    kinds = ("--fault", "terminate-all", "--fault", "records-again")
    result = subprocess.run(
        (sys.executable, "-m", "orderflow", "torture", "--each", *kinds, "--seed", "1", "--seconds", "6", "--json", *broker),
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout[-3000:]
    reports = json.loads(result.stdout)
    assert list(reports) == ["terminate-all", "records-again"]
    for report in reports.values():
        assert report["sound"] is True
        assert len({one["fault"]["kind"] for one in report["injected"]}) == 1
        assert sum(report["states"].values()) >= report["load"]["accepted"] > 0


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_every_promise_is_measured_and_nothing_is_lost_meanwhile() -> None:
    if servers.choose_broker().kind != "kafka":
        pytest.skip("needs Apache Kafka")
    result = subprocess.run(
        (sys.executable, "-m", "orderflow", "torture", "--promises", "--quick", "--json"), cwd=ROOT, capture_output=True,
        text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert result.stdout, result.stderr
    report = json.loads(result.stdout)
    # What each took is for `orderflow torture --promises` on a machine of its own to say; that each ended is shown here.
    assert report["problems"] == []
    assert [row["promise"] for row in report["promises"]] == [promise.text for promise in PROMISES]
    assert all(row["value"] <= row["limit"] for row in report["promises"] if row["unit"] != "s")


async def test_a_promise_that_cannot_be_measured_is_a_problem_and_the_others_are_measured() -> None:
    async def never(stage: Stage) -> Measured:
        raise TimeoutError("nobody came")

    async def kept(stage: Stage) -> Measured:
        return Measured(0.5)

    promises = (Promise("one", 1, "s", never), Promise("another", 1, "s", kept))
    stage: Any = SimpleNamespace(problems=[])
    found = await measured(stage, promises, lambda done, text: None)
    assert [(promise.text, result.value) for promise, result in found] == [("another", 0.5)]
    assert stage.problems == ["one: not measured: TimeoutError: nobody came"]


def test_the_plan_is_a_pure_function_of_the_seed() -> None:
    assert plan(7, 60.0) == plan(7, 60.0)
    assert plan(7, 60.0) != plan(8, 60.0)


def test_a_longer_plan_begins_like_a_shorter_one() -> None:
    short, long = plan(7, 30.0), plan(7, 300.0)
    assert [(f.at, f.kind, f.pick) for f in short] == [(f.at, f.kind, f.pick) for f in long[: len(short)]]


def test_faults_that_are_further_apart_are_the_same_ones() -> None:
    dense, sparse = plan(7, 300.0), plan(7, 600.0, every=4.5)
    shared = min(len(dense), len(sparse))
    assert shared > 100
    assert [(f.kind, f.pick) for f in sparse[:shared]] == [(f.kind, f.pick) for f in dense[:shared]]
    gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(sparse)]
    assert min(gaps) >= SHORTEST_GAP - 0.01
    assert 3.5 < sum(gaps) / len(gaps) < 5.5


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_has_its_turn_before_any_has_its_second(seed: int) -> None:
    kinds = [fault.kind for fault in plan(seed, 600.0)]
    for begin in range(0, len(kinds) - len(Kind), len(Kind)):
        assert set(kinds[begin : begin + len(Kind)]) == set(Kind)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_keeps_to_its_time(seed: int) -> None:
    faults = plan(seed, 40.0)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    for fault in faults:
        assert (fault.lasts > 0) == (fault.kind in LASTING)
        assert fault.at + fault.lasts <= 40.0 + 0.1


def test_a_broker_that_forgets_is_not_restarted() -> None:
    assert {fault.kind for fault in plan(1, 300.0)} >= OF_KAFKA
    assert not OF_KAFKA & {fault.kind for fault in plan(1, 300.0, kinds=_kinds([], embedded_broker=True))}


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--fault", "kill-everything"), "no fault is named 'kill-everything'"),
        (("--fault", "kafka-wiped", "--embedded-broker"), "kafka-wiped needs Apache Kafka"),
        (("--only", "1,x"), "numbers from 1 to"),
        (("--only", "99999"), "numbers from 1 to"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_started(option: tuple[str, ...], told: str) -> None:
    result = CliRunner().invoke(torture, [*option, "--seed", "1"])
    assert result.exit_code == 2
    assert told in result.output


def test_every_kind_of_fault_is_known_to_those_who_do_them(tmp_path: Path) -> None:
    grounds: Any = SimpleNamespace(postgres=None, victims=None)
    assert set(Faults(grounds, lambda summary: None).actions) == set(Kind)


async def test_the_processes_below_one_are_found() -> None:
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "sleep 30 & echo $!; wait", stdout=subprocess.PIPE)
    assert process.stdout is not None
    below = int(await process.stdout.readline())
    try:
        assert below in await descendants(process.pid)
        assert process.pid in await descendants(os.getpid())
    finally:
        os.kill(below, signal.SIGKILL)
        await process.wait()


async def test_a_narrow_terminal_hides_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    path = "/" + "a-long-way/" * 20
    process = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", "read line", path, "run", "--role", "worker", stdin=subprocess.PIPE
    )
    try:
        assert await Victims(os.getpid()).of("worker") == [Victim("worker", process.pid)]
    finally:
        process.kill()
        await process.wait()


def test_victims_are_the_living_children_of_the_parent() -> None:
    listing = """
      10     1 Ss   python -m orderflow run --api 1 --worker 2
      11    10 Sl   python -m orderflow run --role api
      12    10 Sl   python -m orderflow run --role worker
      13    10 Z    [python] <defunct>
      14    10 Z    python -m orderflow run --role worker
      15    12 S    python -m orderflow run --role worker
      16    10 Tl   python -m orderflow run --role worker
    """.strip()
    assert listed(listing, 10) == [Victim("api", 11), Victim("worker", 12), Victim("worker", 16)]


def test_a_record_cut_short_by_a_kill_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "accepted"
    ids = [uuid.uuid4() for _ in range(3)]
    record = Record(str(path))
    for order_id in ids:
        record.accepted(str(order_id))
    record.close()
    path.write_bytes(path.read_bytes()[:-10])
    assert accepted_ids(str(path)) == ids[:2]


def test_orders_of_the_load_are_a_function_of_its_seed() -> None:
    assert order_body(random.Random(1)) == order_body(random.Random(1)) != order_body(random.Random(2))


class UnreliableApi:
    """Answers POST /orders: 503 first, then the connection is dropped after the order was placed, then 201."""

    def __init__(self) -> None:
        self.orders: dict[str, str] = {}
        self.attempts: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
                await reader.readexactly(int(fields["Content-Length"]))
                key = fields["Idempotency-Key"]
                self.attempts[key] += 1
                if self.attempts[key] == 1:
                    writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}")
                    continue
                order_id = self.orders.setdefault(key, str(uuid.uuid4()))
                if self.attempts[key] == 2:
                    return
                writer.write(f"HTTP/1.1 201 Created\r\nLocation: /orders/{order_id}\r\nContent-Length: 0\r\n\r\n".encode())
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


async def test_persistent_clients_ask_until_each_key_has_its_201(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderflow.bench.persistent.RETRY_PAUSE", 0.001)
    monkeypatch.setattr("orderflow.bench.persistent.on_end_of_input", lambda stop: None)
    api = UnreliableApi()
    server = await asyncio.start_server(api.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    record = tmp_path / "accepted"
    options = Options("127.0.0.1", port, 4, 0.3, str(record), persistent=True, rate=200.0, patience=10.0)
    async with server:
        summary = await PersistentClients(options).run()
    assert summary.accepted == len(api.orders) > 0
    assert summary.unresolved == 0
    assert summary.contradictions == []
    assert summary.lost_connections >= summary.accepted
    assert sorted(map(str, set(accepted_ids(str(record))))) == sorted(api.orders.values())
