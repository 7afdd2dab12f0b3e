"""Schemathesis against the listening API: every check that it has, over examples, limits, random input and call sequences."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import asyncpg
import pytest

from orderflow.logs import METRIC_ONLY
from orderflow.orders.api_keys import new_key
from tests.serving import serving

TIME_LIMIT = 150
PHASES = ("Examples", "Coverage", "Fuzzing", "Stateful")

# Two different orders with one key are a 422 by contract, and random keys are often the same: a valid key gets a unique
# start, so that a valid order has to be taken. Wrong keys are sent as they are.
HOOKS = r"""
import re, uuid
import schemathesis

@schemathesis.hook
def before_call(context, case, **kwargs):
    key = (case.headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and re.fullmatch(r'[!#-~][!-~]{0,200}|"([!#-\[\]-~]|\\["\\]){1,200}"', key):
        quote = '"' if key.startswith('"') else ""
        case.headers["Idempotency-Key"] = quote + uuid.uuid4().hex + key.removeprefix(quote)
"""


@pytest.mark.slow
@pytest.mark.timeout(TIME_LIMIT + 30)
@pytest.mark.parametrize("keys", [False, True], ids=["open", "behind keys"])
async def test_the_api_does_what_its_document_says(
    keys: bool, database_url: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    key, entry = new_key("schemathesis")
    (tmp_path / "hooks.py").write_text(HOOKS)
    # A configuration of its own: otherwise one of a directory above would be found. The key goes with every request but those
    # that are made to see whether they are refused without.
    (tmp_path / "schemathesis.toml").write_text(f'[auth.openapi.apiKey]\nbearer = "{key}"\n' if keys else "")
    async with serving(database_url, api_keys=entry if keys else "", api_key_rate=0) as api:
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json", "--checks", "all",
            "--max-examples", "30", "--generation-deterministic", "--no-color", "--no-shrink",
            cwd=tmp_path, env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(TIME_LIMIT):
                output = (await program.communicate())[0].decode()
        finally:
            if program.returncode is None:
                program.kill()
                await program.wait()
        assert program.returncode == 0, output
        assert "7 selected / 7 total" in output, output
        assert all(f"✅  {phase} " in output for phase in PHASES), output
        # It found the way to place orders, and nothing of what it sent was an error of ours.
        assert await connection.fetchval("SELECT count(*) FROM orders") > 50
        assert {event for _, event, _ in api.facts} - METRIC_ONLY == {"STARTUP"}
