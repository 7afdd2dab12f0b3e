"""Start the load generator and take its summary."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from uuid import UUID

from orderflow.bench.load import LAST_ANSWERS_TIMEOUT, Options, Summary
from orderflow.bench.program import ProgramFailed, environment_of

START_TIMEOUT = 20.0


async def send(options: Options, enough: asyncio.Event | None = None) -> Summary:
    """Run the load generator to its end, which comes after `options.seconds` or with `enough`.

    Raises ProgramFailed when it fails, or does not end.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orderflow.bench.load", json.dumps(asdict(options)),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=environment_of({}),
    )  # fmt: skip
    stopping = asyncio.create_task(_stop(process, enough)) if enough is not None else None
    limit = START_TIMEOUT + options.seconds + options.patience + LAST_ANSWERS_TIMEOUT
    try:
        async with asyncio.timeout(limit):
            said, complaint = await _output(process)
    except TimeoutError:
        raise ProgramFailed(f"the load generator did not end within {limit:.0f} s") from None
    finally:
        if stopping is not None:
            stopping.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise ProgramFailed(f"the load generator failed: {complaint.decode(errors='replace').strip()[-500:]}")
    return Summary(**json.loads(said))


async def _stop(process: asyncio.subprocess.Process, enough: asyncio.Event) -> None:
    await enough.wait()
    assert process.stdin is not None
    process.stdin.close()


async def _output(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    # Not communicate(): it would close standard input, which is how the generator is told to end.
    assert process.stdout is not None
    assert process.stderr is not None
    said, complaint, _ = await asyncio.gather(process.stdout.read(), process.stderr.read(), process.wait())
    return said, complaint


def accepted_ids(record: str) -> list[UUID]:
    """The orders for which a client holds a 201; a last line that was cut short by a kill is left out."""
    with open(record, encoding="ascii") as lines:
        return [UUID(line.strip()) for line in lines if line.endswith("\n")]
