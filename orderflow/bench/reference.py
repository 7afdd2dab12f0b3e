"""Reference B: one order's five transactions, step by step, as pgbench does them on the program's own schema."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orderflow.bench.program import ProgramFailed
from orderflow.bench.servers import Servers, Target
from orderflow.embedded.access import clean_environment
from orderflow.embedded.binaries import system_binaries, wheel_binaries
from orderflow.embedded.errors import EmbeddedError

CLIENTS = 8
THREADS = 2
START_TIMEOUT = 60.0

# With the triggers and constraints of schema.sql, and what any step-by-step program has to write; it leaves out what only
# orderflow does (the OrderPaid event's own processed row, the gateway's ledger, HTTP, Kafka). Prepared: the faster protocol.
SCRIPT = """\
\\set cents random(100, 99999)
BEGIN;
INSERT INTO orders (id, user_id, amount) VALUES (gen_random_uuid(), gen_random_uuid(), :cents / 100.0)
    RETURNING id AS order_id \\gset
INSERT INTO outbox (event_type, aggregate_id, payload)
    VALUES ('OrderCreated', :order_id, jsonb_build_object('orderId', :order_id::uuid, 'amount', :cents::integer))
    RETURNING event_id AS created_event \\gset
COMMIT;
UPDATE outbox SET published_at = now() WHERE event_id = :created_event AND published_at IS NULL;
UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, updated_at = now(), entered_at = entered_at || now()
    WHERE id = :order_id AND state = 'CREATED' AND version = 1;
BEGIN;
UPDATE orders SET state = 'PAID', version = 3, updated_at = now(), entered_at = entered_at || now()
    WHERE id = :order_id AND state = 'PAYMENT_PENDING' AND version = 2;
INSERT INTO outbox (event_type, aggregate_id, payload)
    VALUES ('OrderPaid', :order_id, jsonb_build_object('orderId', :order_id::uuid, 'amount', :cents::integer))
    RETURNING event_id AS paid_event \\gset
INSERT INTO processed_events (event_id, worker_id) VALUES (:created_event, 'pgbench');
COMMIT;
UPDATE outbox SET published_at = now() WHERE event_id = :paid_event AND published_at IS NULL;
"""


def pgbench(servers: Servers) -> Path:
    """The pgbench next to the server's programs, else the wheel's, Debian's, or the one on PATH.

    Raises EmbeddedError where there is none.
    """
    if servers.postgres is not None:
        beside = servers.postgres.binaries.bindir / "pgbench"
        if beside.exists():
            return beside
    try:
        return wheel_binaries().program("pgbench")
    except EmbeddedError as error:
        for major in (18, 17, 16, 15):
            found = system_binaries(major)
            if found is not None and (found.bindir / "pgbench").exists():
                return found.bindir / "pgbench"
        on_path = shutil.which("pgbench")
        if on_path is None:
            raise EmbeddedError(f"reference B needs pgbench: apt install postgresql-contrib ({error})") from None
        return Path(on_path)


def orders_per_second(output: str) -> float:
    """pgbench's own figure, without the time for connecting. Raises ProgramFailed when it is missing, or a script failed."""
    found = re.search(r"^tps = ([0-9.]+)", output, re.MULTILINE)
    failed = re.search(r"^number of failed transactions: (\d+)", output, re.MULTILINE)
    if found is None or (failed is not None and int(failed[1])):
        raise ProgramFailed(f"pgbench gave no figure: {output.strip()[-500:]}")
    return float(found[1])


async def measure(servers: Servers, target: Target, directory: Path, *, seconds: float) -> float:
    """Orders per second of `pgbench -c 8 -j 2` against that database. Raises EmbeddedError, ProgramFailed."""
    script = directory / "five-transactions.pgbench"
    script.write_text(SCRIPT, encoding="ascii")
    where = urlsplit(target.database_url)
    # By environment: on a command line `ps` would show the password.
    environment = clean_environment(
        {
            "PGHOST": where.hostname or "", "PGPORT": str(where.port or 5432), "PGDATABASE": where.path.lstrip("/"),
            "PGUSER": unquote(where.username or ""), "PGPASSWORD": unquote(where.password or ""),
        }
    )  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        pgbench(servers), "-n", "-M", "prepared", "-c", str(CLIENTS), "-j", str(THREADS), "-T", str(max(1, round(seconds))),
        "-f", script, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=environment,
    )  # fmt: skip
    try:
        async with asyncio.timeout(seconds + START_TIMEOUT):
            output, complaint = await process.communicate()
    except TimeoutError:
        raise ProgramFailed(f"pgbench did not end within {seconds + START_TIMEOUT:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise ProgramFailed(f"pgbench failed: {complaint.decode(errors='replace').strip()[-500:]}")
    return orders_per_second(output.decode())
