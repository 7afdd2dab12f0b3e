"""Measuring modules as processes of their own: `python -m MODULE OPTIONS`, OPTIONS and the one line of output JSON.

Such a process ends after its time, or when its standard input does: so it outlives nobody who started it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

from orderflow.bench.program import ProgramFailed, environment_of

START_TIMEOUT = 20.0

Given = TypeVar("Given")


async def run_apart(module: str, options: Any, *, limit: float, enough: asyncio.Event | None = None) -> dict[str, Any]:
    """Run it to its end, or until `enough`; returns what it printed. `options` is the dataclass that its `main` takes.

    Raises ProgramFailed when it fails, or has not ended `limit` seconds after its start.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, json.dumps(asdict(options)),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=environment_of({}),
    )  # fmt: skip
    stopping = asyncio.create_task(_stop(process, enough)) if enough is not None else None
    limit += START_TIMEOUT
    try:
        async with asyncio.timeout(limit):
            said, complaint = await _output(process)
    except TimeoutError:
        raise ProgramFailed(f"{module} did not end within {limit:.0f} s") from None
    finally:
        if stopping is not None:
            stopping.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise ProgramFailed(f"{module} failed: {complaint.decode(errors='replace').strip()[-500:]}")
    document: dict[str, Any] = json.loads(said)
    return document


async def _stop(process: asyncio.subprocess.Process, enough: asyncio.Event) -> None:
    await enough.wait()
    assert process.stdin is not None
    process.stdin.close()


async def _output(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    # Not communicate(): it would close standard input, which is how the process is told to end.
    assert process.stdout is not None
    assert process.stderr is not None
    said, complaint, _ = await asyncio.gather(process.stdout.read(), process.stderr.read(), process.wait())
    return said, complaint


def serve(options_of: Callable[..., Given], run: Callable[[Given], Coroutine[Any, Any, Any]]) -> int:
    """The `main` of such a module: run with the options of the command line, print the dataclass that comes of it.

    1 when a server could not be reached.
    """
    options = options_of(**json.loads(sys.argv[1]))
    loop_factory: Any = None
    try:
        import uvloop

        loop_factory = uvloop.new_event_loop
    except ImportError:
        pass
    # What the imports left would be looked through in the middle of a measurement.
    gc.freeze()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        try:
            result = runner.run(run(options))
        except (OSError, TimeoutError) as error:
            print(f"a server cannot be reached: {error}", file=sys.stderr)
            return 1
    print(json.dumps(asdict(result)))
    return 0


def on_end_of_input(stop: Callable[[], None]) -> None:
    """Call `stop` when whoever started us closes our standard input, or dies."""

    def readable() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop()

    loop = asyncio.get_running_loop()
    loop.add_reader(0, readable)
