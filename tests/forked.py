"""`orderflow` with many command lines: each a process of its own, forked from one program that has paid for the imports.

Run as `python -m tests.forked`, this module is that program: a JSON list of [arguments, environment] on stdin, for
each as it ends one line [place, exit code, stdout, stderr] on stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 2
TIMEOUT = 60
# With what these import in their turn, nearly all that any command needs.
IMPORTED = ("orderflow.app", "orderflow.commands.doctor")


class Ended(NamedTuple):
    """A command's exit code and all that it said."""

    code: int
    said: str
    errors: str


async def forked(wanted: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> list[Ended]:
    """Run `orderflow` with each of these arguments and settings, two at a time, and nothing of what is set outside.

    Fails where one has not ended by itself after a minute.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("ORDERFLOW_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.forked", cwd=ROOT, env=inherited,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        given = json.dumps([[arguments, {**inherited, **environment}] for arguments, environment in wanted])
        output, _ = await process.communicate(given.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    ended = {place: Ended(*how) for place, *how in map(json.loads, output.splitlines())}
    for place, (arguments, _) in enumerate(wanted):
        assert place in ended, f"{arguments} did not even start"
        assert ended[place].code >= 0, f"{arguments} was ended by signal {-ended[place].code}: {ended[place]}"
    return [ended[place] for place in range(len(wanted))]


def _nameless_file() -> int:
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    return descriptor


def _run(arguments: Sequence[str], environment: Mapping[str, str], said: int, errors: int) -> None:
    signal.alarm(TIMEOUT)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(errors, 2)
    sys.argv[1:] = arguments
    runpy.run_module("orderflow", run_name="__main__", alter_sys=True)


def _main() -> None:
    for name in IMPORTED:
        __import__(name)
    waiting = list(enumerate(json.load(sys.stdin)))[::-1]
    running = {}
    while waiting or running:
        if waiting and len(running) < AT_ONCE:
            place, (arguments, environment) = waiting.pop()
            files = _nameless_file(), _nameless_file()
            pid = os.fork()
            if not pid:
                _run(arguments, environment, *files)
                return
            running[pid] = place, files
        else:
            pid, status = os.wait()
            place, files = running.pop(pid)
            texts = [os.pread(file, 2**24, 0).decode() for file in files]
            print(json.dumps([place, os.waitstatus_to_exitcode(status), *texts]), flush=True)


if __name__ == "__main__":
    _main()
