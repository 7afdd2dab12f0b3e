"""S1: how long the program takes until it serves, and until it has printed its help."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from orderflow.bench.program import Program, ProgramFailed, environment_of
from orderflow.bench.servers import Servers, Target

HELP_TIMEOUT = 30.0


async def seconds_to_ready(servers: Servers, directory: Path) -> float:
    """From the start of `orderflow run` (all roles, servers up, topic there) to its first 200 on /readyz."""
    async with servers.fresh() as target:
        await _once(target, directory)  # creates the topic
        return await _once(target, directory)


async def _once(target: Target, directory: Path) -> float:
    program = Program((), target.environment(), directory, name=target.topic)
    took = await program.start()
    code = await program.stop()
    if code != 0:
        raise ProgramFailed(f"`orderflow run` ended with exit code {code} after a SIGTERM: {program.log_tail()}")
    return took


async def seconds_to_help() -> float:
    """One `orderflow --help`, from the fork to the end of the process."""
    begun = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orderflow", "--help",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, env=environment_of({}),
    )  # fmt: skip
    try:
        async with asyncio.timeout(HELP_TIMEOUT):
            code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code != 0:
        raise ProgramFailed(f"`orderflow --help` ended with exit code {code}")
    return time.monotonic() - begun
