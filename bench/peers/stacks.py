"""The stacks that are compared, and how each is started: its processes, ended with us however we end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from bench.peers.environments import python_of, redis_server
from orderflow.bench.exchange import Address, ask, get
from orderflow.bench.program import ProgramFailed, environment_of
from orderflow.bench.servers import Target
from orderflow.embedded import ports
from orderflow.embedded.process import GuardedChild

HERE = Path(__file__).resolve().parent
READY_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
PROBE_TIMEOUT = 2.0

# In a database of its own: a peer gets the columns of ours that it needs, and none of our triggers and indexes.
ORDERS = """
DROP SCHEMA public CASCADE;
CREATE SCHEMA public;
CREATE TABLE orders (
    id         uuid          PRIMARY KEY,
    user_id    uuid          NOT NULL,
    state      text          NOT NULL DEFAULT 'CREATED',
    version    integer       NOT NULL DEFAULT 1,
    amount     numeric(12,2) NOT NULL,
    created_at timestamptz   NOT NULL DEFAULT now(),
    updated_at timestamptz   NOT NULL DEFAULT now()
);
"""
OURS = {
    "ORDERFLOW_GATEWAY_DELAY_MS": "0", "ORDERFLOW_GATEWAY_SUCCESS_RATE": "1.0", "ORDERFLOW_LOG_FORMAT": "json",
    "ORDERFLOW_HTTP_HOST": ports.HOST,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stack:
    """One line of the table. `processes`: the arguments of its Python, by the process' name. `peer`: its environment; None is
    ours. `schema`: what makes its own tables. `atomic`: whether order and message commit together.
    """

    name: str
    processes: Mapping[str, tuple[str, ...]]
    atomic: bool
    peer: str | None = None
    schema: tuple[str, ...] = ()
    redis: bool = False


def _flow(file: str, *roles: str) -> dict[str, tuple[str, ...]]:
    return {role: (file, role) for role in roles}


STACKS: dict[str, Stack] = {
    "orderflow": Stack("orderflow, one process", {"orderflow": ("-m", "orderflow", "run")}, atomic=True),
    "orderflow-split": Stack(
        "orderflow, api + publisher + worker",
        {"orderflow": ("-m", "orderflow", "run", "--api", "1", "--publisher", "1", "--worker", "1")}, atomic=True,
    ),
    "celery": Stack(
        "Celery + Redis",
        {
            "api": ("celery_redis.py",),
            "worker": ("-m", "celery", "-A", "celery_redis", "worker", "--loglevel", "WARNING"),
        },
        atomic=False, peer="celery", redis=True,
    ),
    "faststream": Stack(
        "faststream-outbox + FastStream + Kafka",
        _flow("faststream_outbox_flow.py", "api", "relay", "worker"),
        atomic=True, peer="faststream", schema=("faststream_outbox_flow.py", "schema"),
    ),
    "procrastinate": Stack(
        "procrastinate",
        _flow("procrastinate_flow.py", "api", "worker"),
        atomic=True, peer="procrastinate", schema=("procrastinate_flow.py", "schema"),
    ),
    "dbos-start": Stack(
        "DBOS, start_workflow", _flow("dbos_flow.py", "start"), atomic=True, peer="dbos", schema=("dbos_flow.py", "schema")
    ),
    "dbos-queue": Stack(
        "DBOS, queue", _flow("dbos_flow.py", "api", "worker"), atomic=True, peer="dbos", schema=("dbos_flow.py", "schema")
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Running:
    """A stack that accepts orders."""

    address: Address
    children: Mapping[str, GuardedChild]

    def log_tails(self) -> str:
        """The last lines of each process' log."""
        return "\n".join(f"{name}: {child.log_tail()}" for name, child in self.children.items())


@asynccontextmanager
async def running(stack: Stack, target: Target, connection: asyncpg.Connection, directory: Path) -> AsyncIterator[Running]:
    """Start every process of the stack on the target's database and topic; the logs are in `directory`.

    Raises EmbeddedError or ProgramFailed, with the end of a log, when that fails.
    """
    address = Address(ports.HOST, ports.free_port())
    settings = {**target.environment(), "TOPIC": target.topic, "HTTP_PORT": str(address.port), **OURS}
    python = await python_of(stack.peer) if stack.peer else Path(sys.executable)
    if stack.peer:
        await connection.execute(ORDERS)
    async with AsyncExitStack() as stopping:
        if stack.redis:
            settings["REDIS_URL"] = await stopping.enter_async_context(_redis(redis_server(python), directory))
        if stack.schema:
            await _to_its_end([python, *stack.schema], settings)
        children: dict[str, GuardedChild] = {}
        for name, arguments in stack.processes.items():
            children[name] = await GuardedChild.spawn(
                [python, *arguments], name=name, log=directory / f"{target.topic}-{name}.log",
                stop_timeout=STOP_TIMEOUT, cwd=HERE, env=environment_of(settings),
            )  # fmt: skip
            stopping.push_async_callback(children[name].stop)
        await children[next(iter(children))].until_ready(lambda: _answers(address), READY_TIMEOUT)
        run = Running(address, children)
        try:
            yield run
            if ended := {name: child.returncode for name, child in children.items() if child.returncode is not None}:
                raise ProgramFailed(f"{stack.name}: ended before its time (process: exit code): {ended}")
        except ProgramFailed as error:
            raise ProgramFailed(f"{error}\n{run.log_tails()}") from error


@asynccontextmanager
async def _redis(program: Path, directory: Path) -> AsyncIterator[str]:
    """A private Redis with its own defaults, as Celery's documentation starts it; gives its address."""
    port = ports.free_port()
    child = await GuardedChild.spawn(
        [program, "--bind", ports.HOST, "--port", str(port), "--dir", directory], name="Redis", log=directory / "redis.log"
    )

    async def answers() -> bool:
        reader, writer = await asyncio.open_connection(ports.HOST, port)
        try:
            writer.write(b"PING\r\n")
            return await reader.readline() == b"+PONG\r\n"
        finally:
            writer.close()

    try:
        await child.until_ready(answers, READY_TIMEOUT)
        yield f"redis://{ports.HOST}:{port}/0"
    finally:
        await child.stop()


async def _to_its_end(command: list[str | Path], settings: Mapping[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=HERE, env=environment_of(settings), stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(READY_TIMEOUT):
            _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise ProgramFailed(f"{' '.join(map(str, command))} failed:\n{said.decode(errors='replace')[-2000:]}")


async def _answers(address: Address) -> bool:
    """Ours is ready when it says so; a peer, which knows no such page, when it says that there is none."""
    return (await ask(address, get(address, "/readyz"), timeout=PROBE_TIMEOUT)).status in (200, 404)
