"""Builds .venv from a locked requirement file, once; an interrupted build is thrown away and begun again.

Usage: python3 scripts/setup_venv.py dev|test     (standard library only: nothing else is there yet)

The stamp `.venv/orderflow-setup.json` is the last thing written and the first thing removed, so an
environment without a stamp is one that was never finished. The stamp holds the set and a fingerprint of
everything the environment came from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "orderflow-setup.json"
SETS = ("dev", "test")  # each contains the ones before it


def fingerprint(wanted: str) -> dict[str, str]:
    """What the environment of this set is made from: two equal fingerprints need no work."""
    sources = (ROOT / "requirements" / f"{wanted}.txt", ROOT / "pyproject.toml", Path(__file__))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    # Scripts in an environment name their interpreter by its full path: a moved checkout needs a new one.
    return {"set": wanted, "python": sys.version, "place": str(VENV), "sources": digest}


def read_stamp() -> dict[str, str]:
    """The stamp of a finished environment; empty for one that is absent, half-made or half-deleted."""
    whole = all(os.access(VENV / "bin" / name, os.X_OK) for name in ("python", "orderflow"))
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if whole and isinstance(stamp, dict) else {}


@contextmanager
def one_at_a_time() -> Iterator[int]:
    """Holds a lock on pyproject.toml; yields its descriptor.

    The kernel lets go of it when the last process that has it open is gone, so a crash leaves nothing stale;
    pip inherits it, so a pip that outlives its killed parent still keeps the next set-up out.
    """
    descriptor = os.open(ROOT / "pyproject.toml", os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("orderflow: another set-up is at work in this directory; waiting for it", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def run(lock: int, *command: str) -> None:
    """Runs one step of the set-up; a failure ends the set-up with one line and without a stamp."""
    result = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=(lock,), check=False)
    if result.returncode != 0:
        step = " ".join(command)
        sys.exit(f"orderflow: set-up failed in: {step}\nMend that and run it again: it starts afresh.")


def build(wanted: str, fresh: bool, lock: int) -> None:
    """Makes the environment of one set, or brings a finished one up to date."""
    STAMP.unlink(missing_ok=True)
    python = str(VENV / "bin" / "python")
    if fresh:
        shutil.rmtree(VENV, ignore_errors=True)
        run(lock, sys.executable, "-m", "venv", str(VENV))
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    # A build from source fetches build tools that no lock file pins. What runs comes as wheels everywhere; one
    # of the test tools has none for Macs with an Intel processor.
    wheels = ("--only-binary=:all:",) if wanted == "dev" else ("--prefer-binary",)
    run(lock, *pip, *wheels, "--require-hashes", "-r", os.path.join("requirements", f"{wanted}.txt"))
    run(lock, *pip, "--no-deps", "--no-build-isolation", "--editable", ".")


def main(wanted: str) -> None:
    """Makes sure that .venv holds at least the set that is wanted."""
    with one_at_a_time() as lock:
        stamp = read_stamp()
        if stamp.get("set") in SETS:
            # The tests' environment also runs the program: `make run` must not take their tools away.
            wanted = max(wanted, stamp["set"], key=SETS.index)
        target = fingerprint(wanted)
        if stamp == target:
            return
        fresh = any(stamp.get(part) != target[part] for part in ("python", "place"))
        version = sys.version.split()[0]
        print(f"Setting up .venv for {wanted} with Python {version} (a minute or so, once)", flush=True)
        started = time.monotonic()
        build(wanted, fresh, lock)
        half_written = STAMP.with_suffix(".new")
        half_written.write_text(json.dumps(target), encoding="utf-8")
        half_written.replace(STAMP)
        print(f"Set up in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        sys.exit(f"usage: setup_venv.py {'|'.join(SETS)}")
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit("orderflow: set-up interrupted; run it again, it starts afresh")
