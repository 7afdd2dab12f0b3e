"""The guard and the plumbing around it: no way to die leaves a server behind, and a stop always ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orderflow.embedded import ports
from orderflow.embedded.access import owned_directory
from orderflow.embedded.errors import AlreadyRunningError, EmbeddedError, ServerDiedError
from orderflow.embedded.guard import descendants
from orderflow.embedded.lock import InstanceLock, alive
from orderflow.embedded.process import GUARD, GuardedChild
from tests.servers import is_gone
from tests.waiting import eventually

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG, which is Linux's")

# A server of its own mind: ignores the stop signal, has a child in a session of its own, tells the child's pid.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, close_fds=False)
print(child.pid, flush=True)
time.sleep(600)
"""
OBEDIENT = "import time\nprint('here', flush=True)\ntime.sleep(600)"


@asynccontextmanager
async def guarded(code: str, log: Path, **options: object) -> AsyncIterator[GuardedChild]:
    child = await GuardedChild.spawn(
        [sys.executable, "-c", code],
        name="the test server",
        log=log,
        capture=True,
        **options,  # type: ignore[arg-type]
    )
    try:
        yield child
    finally:
        await child.kill()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


async def test_a_stop_sends_the_chosen_signal(log: Path) -> None:
    async with guarded(OBEDIENT, log, stop_signal=signal.SIGINT) as child:
        assert await child.said(10) == "here"
        assert child.returncode is None
        await child.stop()
        assert is_gone(child.pid)
        assert child.returncode is not None
    assert "KeyboardInterrupt" in log.read_text()


async def test_a_server_that_ignores_its_stop_signal_is_killed_with_everything_below_it(log: Path) -> None:
    async with guarded(STUBBORN, log, stop_timeout=0.2) as child:
        grandchild = int(await child.said(10))
        assert await asyncio.wait_for(child.stop(), 10) == -signal.SIGKILL
        await eventually(lambda: is_gone(grandchild))


async def test_stop_with_a_shorter_patience_of_the_caller(log: Path) -> None:
    async with guarded(STUBBORN, log, stop_timeout=60) as child:
        await child.said(10)
        assert await asyncio.wait_for(child.stop(timeout=0.1), 10) == -signal.SIGKILL


async def test_a_kill_gets_through_while_a_stop_waits(log: Path) -> None:
    async with guarded(STUBBORN, log, stop_timeout=60) as child:
        await child.said(10)
        stopping = asyncio.ensure_future(child.stop())
        await asyncio.sleep(0)
        assert await asyncio.wait_for(child.kill(), 10) == -signal.SIGKILL
        assert await asyncio.wait_for(stopping, 10) == -signal.SIGKILL


async def test_kill_takes_the_whole_tree(log: Path) -> None:
    async with guarded(STUBBORN, log) as child:
        grandchild = int(await child.said(10))
        assert grandchild in descendants(child.pid)
        assert await child.kill() == -signal.SIGKILL
        await eventually(lambda: is_gone(grandchild))


async def test_a_paused_server_can_be_stopped(log: Path) -> None:
    async with guarded(OBEDIENT, log, stop_timeout=60) as child:
        await child.said(10)
        await child.pause()
        assert await asyncio.wait_for(child.stop(), 10) == -signal.SIGTERM


async def test_its_end_is_noticed_whatever_the_cause(log: Path) -> None:
    async with guarded("raise SystemExit(7)", log) as child:
        assert await asyncio.wait_for(child.wait(), 10) == 7
        with pytest.raises(ServerDiedError, match="exit code 7"):
            await child.until_ready(_never, 10)
    async with guarded(OBEDIENT, log) as child:
        os.kill(child.pid, signal.SIGKILL)
        assert await asyncio.wait_for(child.wait(), 10) == -signal.SIGKILL
        await child.stop()
        await child.kill()


async def test_a_server_that_never_gets_ready_is_reported_with_its_log(log: Path) -> None:
    async with guarded("import sys, time; print('busy', file=sys.stderr, flush=True); time.sleep(600)", log) as child:
        await eventually(lambda: "busy" in log.read_text())
        with pytest.raises(EmbeddedError, match=r"not ready within 0 s(.|\n)*busy"):
            await child.until_ready(_never, 0.1)


async def test_a_program_that_does_not_exist_is_an_error_for_people(log: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"the thing cannot be started: .*No such file"):
        await GuardedChild.spawn(["/nowhere/at/all"], name="the thing", log=log)


@LINUX_ONLY
async def test_a_killed_guard_leaves_no_orphan(log: Path) -> None:
    async with guarded(OBEDIENT, log, death_signal=signal.SIGTERM) as child:
        os.kill(child.guard_pid, signal.SIGKILL)
        await eventually(lambda: is_gone(child.pid))
        assert await asyncio.wait_for(child.wait(), 10) < 0


async def test_ctrl_c_in_the_terminal_does_not_reach_the_server(log: Path) -> None:
    async with guarded(OBEDIENT, log) as child:
        ours = os.getpgid(0)
        assert os.getpgid(child.pid) != ours
        assert os.getpgid(child.guard_pid) != ours
        assert os.getsid(child.guard_pid) != os.getsid(0)


async def test_a_server_outlives_the_event_loop_that_started_it(log: Path) -> None:
    def in_a_loop_of_its_own() -> GuardedChild:
        async def start() -> GuardedChild:
            return await GuardedChild.spawn([sys.executable, "-c", OBEDIENT], name="x", log=log, capture=True)

        return asyncio.run(start())

    child = await asyncio.to_thread(in_a_loop_of_its_own)
    assert await child.said(10) == "here"
    assert await child.stop() == -signal.SIGTERM


def test_the_guard_alone_imports_nothing_heavy() -> None:
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", str(GUARD), "--help"],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert "--stop-signal" in run.stdout
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert not {"asyncio", "asyncpg", "aiokafka", "site", "orderflow"} & imported


def test_the_guard_runs_as_a_module_too() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "orderflow.embedded.guard", "--", sys.executable, "-c", "import time; time.sleep(600)"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    pid, end = run.stdout.splitlines()
    assert pid.startswith("guard pid ")
    assert end == f"guard exit {-signal.SIGTERM}"


async def test_the_lock_belongs_to_the_server_and_not_to_its_starter(tmp_path: Path, log: Path) -> None:
    async with await InstanceLock.acquire(tmp_path) as lock, guarded(STUBBORN, log, keep_fds=[lock.fd]) as child:
        lock.record(child.pid)
        lock.close()
        grandchild = int(await child.said(10))
        with pytest.raises(AlreadyRunningError, match=f"already running here, pid {child.pid}"):
            await InstanceLock.acquire(tmp_path)
        # Its main process is gone, what it left behind still works on the files.
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()
        with pytest.raises(AlreadyRunningError):
            await InstanceLock.acquire(tmp_path, patience=0.1)
        os.kill(grandchild, signal.SIGKILL)
        (await InstanceLock.acquire(tmp_path, patience=10)).close()


@pytest.mark.parametrize("content", ["", "nonsense\n", "1 2 3\n", f"{2**40} {2**40}\n"])
async def test_a_stale_lock_file_means_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    (await InstanceLock.acquire(tmp_path, patience=1)).close()


def test_a_process_that_nobody_has_reaped_is_not_alive() -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    assert ended.stdout is not None
    with ended, ended.stdout:
        assert alive(os.getpid())
        ended.stdout.read()
        if sys.platform == "linux":
            os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
            assert not alive(ended.pid)
    assert not alive(ended.pid)
    assert not alive(2**40)


def test_a_port_in_use_is_not_chosen() -> None:
    with socket.socket() as taken:
        taken.bind((ports.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not ports.is_free(port)
        assert ports.choose(port) != port
    assert ports.choose(port) == port


def test_two_who_claim_at_once_get_two_ports() -> None:
    wanted = ports.free_port()
    first, held = ports.claim(wanted)
    with held:
        second, other = ports.claim(wanted)
        other.close()
    assert first == wanted
    assert second != wanted
    again, held = ports.claim(wanted)
    held.close()
    assert again == wanted


def test_a_directory_that_somebody_laid_beforehand_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "open").chmod(0o777)
    names = ["file", "link", "open"]
    if os.geteuid() == 0:
        os.chown(tmp_path / "foreign", 65534, 65534)
        names.append("foreign")
    for name in names:
        with pytest.raises(EmbeddedError, match="not a directory that belongs to us alone"):
            owned_directory(tmp_path / name)
    assert owned_directory(tmp_path / "ours") == owned_directory(tmp_path / "ours")


async def _never() -> bool:
    return False
