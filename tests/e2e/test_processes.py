"""A parent and its children as real processes: restarts, signals, budgets, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orderflow.children import child_environment, worker_name
from orderflow.engine.patience import Misconfigured
from orderflow.held_port import held_port
from orderflow.settings import Settings, load
from tests.programs import FACTS, ROOT, Program, alive, end_all, holds

# A role that says it is up, and behaves on its end as the mode says.
CHILD = FACTS + textwrap.dedent("""
    from orderflow.parent import watch_parent
    from orderflow.settings import load
    from orderflow.supervisor import supervise

    settings = load()
    assert settings.dev_children
    watch_parent(settings.grace_seconds)
    mode, role = sys.argv[1:]
    up = dict(role=role, worker=settings.worker_id, port=settings.http_port, reuse=settings.http_reuse_port,
              metrics=os.environ["PROMETHEUS_MULTIPROC_DIR"], session=os.getsid(0), arguments=sys.argv)

    class Service:
        name = role
        async def run(self, stopping):
            tell("UP", **up)
            await stopping.wait()
            if mode == "deaf":
                tell("DEAF", role=role)
                while True:
                    time.sleep(0.01)
            tell("DOWN", role=role)

    if mode == "talk":
        from orderflow import logs
        from orderflow.engine.telemetry import WORKER, emit
        log = logs.install(settings)

        async def talk(stopping):
            while not stopping.is_set():
                emit(WORKER, "LINE", pid=os.getpid())
                await asyncio.sleep(0.001)
        Service.run = lambda self, stopping: talk(stopping)
    if mode == "crash":
        tell("CRASH", role=role)
        sys.exit(1)
    if mode == "misconfigured":
        tell("REFUSES", role=role)
        sys.exit(78)
    sys.exit(asyncio.run(supervise([Service()], grace=settings.grace_seconds, crash_budget=0, crash_window=1.0,
                                   on_drain=lambda: None, child=True)))
""")

PARENT = """
from orderflow.processes import run_processes
from orderflow.settings import load

child, modes, counts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
if "talk" in modes.values():
    from orderflow import logs
    logs.install(load())
else:
    subscribe()
def command(role):
    return [sys.executable, "-c", child, modes.get(role, "obey"), role]

if sys.argv[4] == "uvloop":
    import uvloop
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
else:
    runner = asyncio.Runner()
with runner:
    code = runner.run(run_processes(load(), counts, command=command))
if "talk" not in modes.values():
    tell("RETURNED", code=code)
sys.exit(code)
"""


@contextmanager
def parent(
    counts: dict[str, int], *, modes: dict[str, str] | None = None, loop: str = "asyncio", **settings: str
) -> Iterator[Program]:
    environment = {"ORDERFLOW_GRACE_SECONDS": "20", "HTTP_PORT": "0", **settings}
    with Program(PARENT, CHILD, json.dumps(modes or {}), json.dumps(counts), loop, environment=environment) as program:
        try:
            yield program
        finally:
            end_all(children(program))


def children(program: Program) -> list[int]:
    """Every process that the parent has told of."""
    return [line["processId"] for line in program.seen if line["type"] == "PROCESS_STARTED"]


def all_gone(program: Program) -> bool:
    return holds(lambda: not any(alive(pid) for pid in children(program)))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_every_child(loop: str, number: signal.Signals) -> None:
    with parent({"api": 1, "publisher": 1, "worker": 2}, loop=loop, ORDERFLOW_DATABASE_POOL_SIZE="3") as program:
        up = [program.until("UP") for _ in range(4)]
        program.send(number)
        assert program.end() == 0
        assert program.types().count("DOWN") == 4
        assert program.types()[-2:] == ["STOPPED", "RETURNED"]
        assert all_gone(program)
        assert program.errors == ""
    assert sorted(line["role"] for line in up) == ["api", "publisher", "worker", "worker"]
    workers = {line["worker"] for line in up if line["role"] == "worker"}
    assert workers == {"payment-worker-1", "payment-worker-2"}
    assert len({line["port"] for line in up}) == 1
    assert up[0]["port"] > 0
    assert all(line["reuse"] for line in up)
    # Ctrl-C reaches a terminal's whole process group: ours must be the only signal that a child gets.
    assert all(line["session"] == line["pid"] for line in up)
    assert not Path(up[0]["metrics"]).exists()


def test_a_killed_child_is_started_again_and_the_others_stay() -> None:
    with parent({"publisher": 1, "worker": 1}) as program:
        up = {line["role"]: line for line in (program.until("UP"), program.until("UP"))}
        os.kill(up["worker"]["pid"], signal.SIGKILL)
        assert program.until("PROCESS_CRASHED")["signal"] == "SIGKILL"
        again = program.until("UP", role="worker")
        assert again["pid"] != up["worker"]["pid"]
        assert again["worker"] == up["worker"]["worker"]
        assert alive(up["publisher"]["pid"])
        program.send(signal.SIGTERM)
        assert program.end() == 0
        assert all_gone(program)


def test_a_child_that_was_asked_to_end_is_started_again_without_a_charge() -> None:
    with parent({"publisher": 1}, ORDERFLOW_CRASH_BUDGET="0") as program:
        os.kill(program.until("UP")["pid"], signal.SIGTERM)
        program.until("PROCESS_ENDED", exitCode=0)
        program.until("UP")
        program.send(signal.SIGTERM)
        assert program.end() == 0


def test_a_spent_budget_drains_the_rest_and_fails() -> None:
    with parent({"publisher": 1, "worker": 1}, modes={"worker": "crash"}, ORDERFLOW_CRASH_BUDGET="2") as program:
        assert program.end() == 1
        assert program.types().count("CRASH") == 3
        assert program.types()[-2:] == ["STOPPED", "RETURNED"]
        assert program.errors == "orderflow: worker-1 crashed too often\n"
        assert all_gone(program)


def test_settings_that_a_child_refuses_end_everything_at_the_first_try() -> None:
    with parent({"publisher": 1, "worker": 1}, modes={"worker": "misconfigured"}) as program:
        assert program.end() == 1
        assert program.types().count("REFUSES") == 1
        assert all_gone(program)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_deaf_child_is_killed_after_the_grace_period(loop: str) -> None:
    with parent({"worker": 1}, modes={"worker": "deaf"}, loop=loop, ORDERFLOW_GRACE_SECONDS="0.1") as program:
        program.until("UP")
        program.send(signal.SIGTERM)
        assert program.until("DRAIN_INCOMPLETE")["processes"] == ["worker-1"]
        assert program.end() == 0
        assert {"signal": "SIGKILL"}.items() <= program.seen[-3].items()
        assert all_gone(program)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_kills_at_once(number: signal.Signals, code: int) -> None:
    with parent({"worker": 2}, modes={"worker": "deaf"}, ORDERFLOW_GRACE_SECONDS="60") as program:
        program.until("UP")
        program.until("UP")
        program.send(signal.SIGTERM)
        program.until("DEAF")
        program.send(number)
        assert program.end() == code
        assert all_gone(program)


@pytest.mark.parametrize("mode", ["obey", "deaf"])
def test_a_sigkill_of_the_parent_leaves_no_child(mode: str) -> None:
    with parent({"publisher": 1, "worker": 2}, modes={"worker": mode}, ORDERFLOW_GRACE_SECONDS="0.5") as program:
        for _ in range(3):
            program.until("UP")
        program.send(signal.SIGKILL)
        program.process.wait()
        assert all_gone(program)


def test_head_ends_the_parent_and_its_children_quietly() -> None:
    program = f"{FACTS}{PARENT}"
    arguments = (CHILD, json.dumps({"worker": "talk"}), json.dumps({"worker": 3}), "asyncio")
    reading, writing = os.pipe()
    talking = subprocess.Popen(
        (sys.executable, "-c", program, *arguments), cwd=ROOT, stdout=writing, stderr=subprocess.PIPE,
        env={**os.environ, "HTTP_PORT": "0"},
    )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        lines = [json.loads(stream.readline())]
        while len({line["pid"] for line in lines if line["type"] == "LINE"}) < 3:
            lines.append(json.loads(stream.readline()))
    _, errors = talking.communicate(timeout=20)
    assert (talking.returncode, errors) == (0, b"")
    assert not any(alive(line["pid"]) for line in lines if line["type"] == "LINE")


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with parent({"api": 2}, HTTP_PORT=str(port)) as program:
            assert program.end() == 1
            assert program.types() == []
            assert f"port {port} on 127.0.0.1 is taken" in program.errors


def test_a_port_that_others_share_is_taken_all_the_same() -> None:
    with socket.socket() as sharing:
        sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sharing.bind(("127.0.0.1", 0))
        sharing.listen()
        with pytest.raises(Misconfigured, match="is taken"), held_port("127.0.0.1", sharing.getsockname()[1]):
            pass


def test_whoever_connects_while_nobody_accepts_waits_for_the_next_process() -> None:
    with held_port("127.0.0.1", 0) as (port, [held]), socket.socket() as stranger:
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with socket.create_connection(("127.0.0.1", port), timeout=5) as waiting:
            # A child's copy, closed as when the child ends, takes nobody along.
            socket.socket(fileno=os.dup(held.fileno())).close()
            with socket.socket(fileno=os.dup(held.fileno())) as child:
                accepted, address = child.accept()
                accepted.close()
                assert address == waiting.getsockname()


def test_every_address_of_a_host_is_listened_on() -> None:
    with held_port("localhost", 0) as (port, sockets):
        assert {one.getsockname()[1] for one in sockets} == {port}
        for one in sockets:
            socket.create_connection(one.getsockname()[:2], timeout=5).close()


@pytest.mark.parametrize(
    ("host", "line"), [("203.0.113.7", "cannot listen on 203.0.113.7:3000"), ("nowhere.invalid", "cannot listen")]
)
def test_an_address_that_is_not_ours_is_refused(host: str, line: str) -> None:
    with pytest.raises(Misconfigured, match=line), held_port(host, 3000):
        pass


def test_every_setting_reaches_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PORT", "4000")
    monkeypatch.setenv("orderflow_topic", "from-the-environment")
    settings = load(
        database_url="postgresql://me:s%20ecret@db:5/x", topic="from-a-flag", kafka_password="p w", grace_seconds=3.5,
        gateway_success_rate=0.25, metrics_port=9100,
    )  # fmt: skip
    environment = child_environment(settings, port=5000, metrics="/somewhere")
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    child = Settings()
    given = {"http_port": 5000, "http_sockets": "", "http_reuse_port": True, "dev_children": True}
    for name in Settings.model_fields:
        assert getattr(child, name) == given.get(name, getattr(settings, name)), name


@pytest.mark.parametrize(
    ("base", "number", "name"),
    [("payment-worker-1", 3, "payment-worker-3"), ("east", 2, "east-2"), ("east-7", 1, "east-1")],
)
def test_worker_names(base: str, number: int, name: str) -> None:
    assert worker_name(base, number) == name
