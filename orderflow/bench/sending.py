"""Start the load generator and take its summary."""

from __future__ import annotations

import asyncio
from uuid import UUID

from orderflow.bench.apart import run_apart
from orderflow.bench.load import LAST_ANSWERS_TIMEOUT, Options, Summary


async def send(options: Options, enough: asyncio.Event | None = None) -> Summary:
    """Run the load generator to its end, which comes after `options.seconds` or with `enough`.

    Raises ProgramFailed when it fails, or does not end.
    """
    limit = options.seconds + options.patience + LAST_ANSWERS_TIMEOUT
    return Summary(**await run_apart("orderflow.bench.load", options, limit=limit, enough=enough))


def accepted_ids(record: str) -> list[UUID]:
    """The orders for which a client holds a 201; a last line that was cut short by a kill is left out."""
    with open(record, encoding="ascii") as lines:
        return [UUID(line.strip()) for line in lines if line.endswith("\n")]
