"""What a figure depends on besides the program: versions, machine, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from orderflow import __version__
from orderflow.bench.program import PACKAGE_PARENT
from orderflow.bench.servers import Servers
from orderflow.settings import masked

GIT_TIMEOUT = 10.0


def commit() -> str | None:
    """The commit of the checkout that runs, with `+changes` when it differs from it; None outside a checkout."""
    if not (PACKAGE_PARENT / ".git").exists():
        return None
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if changed else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE_PARENT), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def about(servers: Servers, arguments: list[str]) -> dict[str, Any]:
    """The head of every report."""
    return {
        "command": " ".join(["orderflow", *(masked(argument) if "://" in argument else argument for argument in arguments)]),
        "orderflow": __version__,
        "commit": commit(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "postgresql": await servers.postgres_version(),
        "broker": servers.broker_name,
        "system": f"{platform.system()} {platform.release()}",
        "processor": cpu(),
        "cpus": usable_cpus(),
        "executable": Path(sys.executable).name,
    }
