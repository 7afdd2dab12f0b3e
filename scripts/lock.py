"""Writes requirements/*.txt from pyproject.toml: pinned, hashed, for every supported Python and platform.

Usage: python3 scripts/lock.py [--upgrade]     (standard library only)

Without --upgrade a pin that still fits stays. The resolver itself is installed from requirements/lock.txt
into an environment that is thrown away afterwards.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = "3.11"
# For every supported Python and platform, and without a word of where packages come from.
PORTABLE = (
    "--universal", "--python-version", OLDEST_PYTHON, "--generate-hashes",
    "--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--quiet",
)  # fmt: skip

# Each file and what goes into it. The largest comes first: its pins bind the others, so that all agree.
FILES: dict[str, tuple[str, ...]] = {
    "test.txt": ("--extra", "dev", "--group", "build", "--group", "test", "--group", "lint"),
    "dev.txt": ("--extra", "dev", "--group", "build"),
    "service.txt": (),
    "build.txt": ("--only-group", "build"),
    "lock.txt": ("--only-group", "lock"),
}


def source(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The resolver's arguments for one file: the project with extras and groups, or a group alone."""
    if parts[:1] == ("--only-group",):
        return ("--group", f"pyproject.toml:{parts[1]}")
    return ("pyproject.toml", *parts)


def lock(uv: str, name: str, parts: tuple[str, ...], flags: list[str]) -> None:
    """Resolves one requirement file."""
    bound = ("--constraint", "requirements/test.txt") if name not in ("test.txt", "lock.txt") else ()
    command = (
        uv, "pip", "compile", *source(parts), *bound, *flags,
        *PORTABLE,
        "--custom-compile-command", "make lock", "--output-file", f"requirements/{name}",
    )  # fmt: skip
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    print(f"requirements/{name}", flush=True)


@contextlib.contextmanager
def resolver() -> Iterator[str]:
    """The path of uv, in an environment that is thrown away afterwards."""
    with tempfile.TemporaryDirectory(prefix="orderflow-lock-") as folder:
        subprocess.run((sys.executable, "-m", "venv", folder), check=True)
        pip = (f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        subprocess.run((*pip, "--require-hashes", "-r", "requirements/lock.txt"), cwd=ROOT, check=True)
        yield f"{folder}/bin/uv"


def main(flags: list[str]) -> None:
    """Writes every requirement file; `flags` go to the resolver."""
    with resolver() as uv:
        for name, parts in FILES.items():
            lock(uv, name, parts, flags)


if __name__ == "__main__":
    main(sys.argv[1:])
