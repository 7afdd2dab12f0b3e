"""Whatever happens to the program that started a server, the server does not outlive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest

from tests.servers import choose_broker, is_gone, make_postgres, scratch_directory
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 60.0

PARENT = """
import asyncio, json, sys
from pathlib import Path
from orderflow.embedded.broker import EmbeddedBroker
from tests.servers import make_kafka, make_postgres

async def main(kind, directory, *options):
    server = {"postgres": make_postgres, "broker": EmbeddedBroker, "kafka": make_kafka}[kind](Path(directory))
    await server.start()
    if "paused" in options:
        await server.pause()
    print(json.dumps({"pid": server.pid, "guard": server.guard_pid}), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


class Started(NamedTuple):
    """A program that has started a server: the process, the server's pid, the guard's."""

    parent: subprocess.Popen[str]
    pid: int
    guard: int


@contextmanager
def a_parent_of(kind: str, directory: Path, *options: str) -> Iterator[Started]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, kind, str(directory), *options],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert parent.stdout is not None
    with parent, parent.stdout:
        try:
            said = json.loads(parent.stdout.readline())
            yield Started(parent, said["pid"], said["guard"])
        finally:
            parent.kill()


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


@pytest.fixture(params=["postgres", "broker", "kafka"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "kafka" and choose_broker().kind != "kafka":
        pytest.skip(f"needs Apache Kafka: {choose_broker().warning}")
    return name


async def test_a_killed_parent_leaves_no_orphan(scratch: Path, kind: str) -> None:
    with a_parent_of(kind, scratch / "server") as started:
        assert not is_gone(started.pid)
        started.parent.kill()
        started.parent.wait(timeout=START_TIMEOUT)
        await eventually(lambda: is_gone(started.pid) and is_gone(started.guard), timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_parent_that_ends_by_a_signal_leaves_no_orphan(scratch: Path, number: int) -> None:
    with a_parent_of("postgres", scratch / "server") as started:
        os.kill(started.parent.pid, number)
        started.parent.wait(timeout=START_TIMEOUT)
        await eventually(lambda: is_gone(started.pid) and is_gone(started.guard), timeout=30)


async def test_a_parent_that_dies_with_its_server_paused(scratch: Path) -> None:
    with a_parent_of("postgres", scratch / "server", "paused") as started:
        started.parent.kill()
        await eventually(lambda: is_gone(started.pid) and is_gone(started.guard), timeout=30)


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG, which is Linux's")
async def test_the_end_of_the_guard_ends_the_server(scratch: Path, kind: str) -> None:
    with a_parent_of(kind, scratch / "server") as started:
        os.kill(started.guard, signal.SIGKILL)
        await eventually(lambda: is_gone(started.pid), timeout=30)


async def test_guard_and_parent_killed_together(scratch: Path) -> None:
    with a_parent_of("postgres", scratch / "server") as started:
        os.kill(started.parent.pid, signal.SIGKILL)
        os.kill(started.guard, signal.SIGKILL)
        if sys.platform == "linux":
            await eventually(lambda: is_gone(started.pid), timeout=30)
        else:
            os.kill(started.pid, signal.SIGQUIT)


async def test_a_successor_may_start_in_the_same_moment(scratch: Path) -> None:
    with a_parent_of("postgres", scratch / "server") as started:
        started.parent.kill()
        started.parent.wait()
        began = time.monotonic()
        # Its server still runs when we ask: we wait for its end, and do not complain that it runs.
        async with make_postgres(scratch / "server") as server:
            assert time.monotonic() - began < 20
            connection = await asyncpg.connect(server.url, timeout=10)
            assert await connection.fetchval("SELECT 1") == 1
            await connection.close()
        assert is_gone(started.pid)
