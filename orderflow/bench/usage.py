"""CPU time and memory of the processes behind a figure, read from /proc: Linux only.

Processes of our own Python are listed one by one. Any other tree is one server and is summed: PostgreSQL's processes share most
of what they hold.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from orderflow.bench.servers import Servers

PROC = Path("/proc")
# A sample reads some hundred small files: about ten milliseconds of a core that is being measured.
SAMPLE_INTERVAL = 1.0
# Looks at one moment before it is taken as it is, with a process in it that ended meanwhile.
CENSUSES = 5

# A process id may be used again; with the time of its start it is one process.
_Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process, or a server with all its processes, took between `start` and `stop`.

    `cpu_seconds`: user and system time; a process that ended between two samples leaves its last one to its parent.
    `peak_bytes`: of a single process the peak of its resident memory since it exists (VmHWM). Of a server the largest sample of
    the private memory of all its processes (RssAnon) plus the largest shared memory of one (RssShmem, RssFile), so that
    shared buffers count once and not once a connection. Not PSS, which would be exact: only the owner of a process and root may
    read it, and the kernel walks all page tables for it, at the cost of what is measured.
    """

    name: str
    pid: int
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class _Process:
    """A process as last seen: seconds of CPU, its own and of its ended children (`reaped`), and sizes in bytes."""

    key: _Key
    parent: int
    own: float
    reaped: float
    name: str
    peak: int
    private: int
    shared: int


class Meter:
    """Watches the trees below `roots` (name -> process id); a root inside of another's tree is counted once, as itself.

    A Python process is named by its role where its command line tells; otherwise a root has the name given here.
    """

    def __init__(self, roots: Mapping[str, int]) -> None:
        self._roots = {pid: name for name, pid in roots.items()}
        self._first: dict[_Key, _Process] = {}
        self._seen: dict[_Key, _Process] = {}
        self._living: set[_Key] = set()
        self._root_of: dict[_Key, int] = {}
        self._servers: dict[int, int] = {}
        self._sampling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to count; what was used before does not."""
        if not sys.platform.startswith("linux"):
            return
        self._servers = {pid: 0 for pid in self._roots if not _is_ours(pid)}
        self._sample()
        self._first = dict(self._seen)
        self._sampling = asyncio.create_task(self._samples())

    async def stop(self) -> list[Usage]:
        """What was used since `start`, in the order of the roots, each followed by its children; empty without a /proc."""
        if self._sampling is None:
            return []
        self._sampling.cancel()
        await asyncio.gather(self._sampling, return_exceptions=True)
        self._sample()
        found: list[Usage] = []
        for root in self._roots:
            tree = [key for key, at in self._root_of.items() if at == root]
            usages = [Usage(self._seen[key].name, key[0], self._cpu(key), self._seen[key].peak) for key in tree]
            if usages and root in self._servers:
                cpu = sum(usage.cpu_seconds for usage in usages)
                usages = [Usage(self._roots[root], root, cpu, self._servers[root])]
            found += usages
        return found

    async def _samples(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL)
            self._sample()

    def _sample(self) -> None:
        self._living = set()
        for root, now in _census(self._roots).items():
            for process in now:
                self._root_of.setdefault(process.key, root)
                # One that has ended and is not reaped yet has its times still, and neither memory nor a command line.
                known = self._seen.get(process.key, process)
                self._seen[process.key] = replace(
                    process, name=process.name or known.name, peak=max(process.peak, known.peak)
                )  # fmt: skip
                self._living.add(process.key)
            if now and root in self._servers:
                held = sum(process.private for process in now) + max(process.shared for process in now)
                self._servers[root] = max(self._servers[root], held)

    def _cpu(self, key: _Key) -> float:
        """Its own time, and what no sample has seen of the processes that ended below it."""
        last, first = self._seen[key], self._before(key)
        used = last.own - first.own
        if key in self._living:
            gone = [seen for seen in self._seen.values() if seen.key not in self._living and self._heir(seen) == key]
            told = sum(seen.own + self._before(seen.key).reaped for seen in gone)
            used += max(0.0, last.reaped - first.reaped - told)
        return used

    def _before(self, key: _Key) -> _Process:
        """As it was at the start."""
        return self._first.get(key) or replace(self._seen[key], own=0.0, reaped=0.0)

    def _heir(self, process: _Process) -> _Key | None:
        """The nearest living ancestor: there the kernel has added the time of one that ended."""
        by_pid = {seen.key[0]: seen for seen in self._seen.values()}
        above = by_pid.get(process.parent)
        while above is not None and above.key not in self._living:
            above = by_pid.get(above.parent)
        return above.key if above else None


def server_roots(servers: Servers) -> dict[str, int]:
    """The servers that we have started ourselves, as roots of a Meter; those that were named may be anywhere."""
    started = {"PostgreSQL": servers.postgres, "Kafka": servers.kafka, "broker": servers.broker}
    return {name: server.pid for name, server in started.items() if server is not None}


def _census(roots: Mapping[int, str]) -> dict[int, list[_Process]]:
    """The processes below each root as they are now, parents before children."""
    trees: dict[int, list[_Process | None]] = {}
    for _ in range(CENSUSES):
        trees = {root: [_read(pid, roots.get(pid)) for pid in tree] for root, tree in _trees(roots).items()}
        # One that was reaped after its parent had been read would be missing here, and its time there: read again.
        if all(process for tree in trees.values() for process in tree[1:]):
            break
    return {root: [process for process in tree if process] for root, tree in trees.items()}


def _trees(roots: Mapping[int, str]) -> dict[int, list[int]]:
    """The living processes below each root, parents before children; a tree ends where another root begins."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))

    def below(pid: int) -> Iterator[int]:
        yield pid
        for child in sorted(children.get(pid, ())):
            if child not in roots:
                yield from below(child)

    return {root: list(below(root)) for root in roots}


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; empty when the process has gone. The second may hold anything."""
    try:
        return (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _read(pid: int, given: str | None) -> _Process | None:
    """The process now, by its given name where its command line tells no other; None when it has gone."""
    fields = _stat(pid)
    try:
        status = (PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
        command = (PROC / str(pid) / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return None
    if not fields:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, system, reaped_user, reaped_system = (int(field) / tick for field in fields[11:15])
    sizes = {name: int(text.split()[0]) * 1024 for name, _, text in map(_parted, status.splitlines()) if text.endswith("kB")}
    return _Process(
        (pid, int(fields[19])), int(fields[1]), user + system, reaped_user + reaped_system,
        role(command) or given or Path(command[0]).name, sizes.get("VmHWM", 0), sizes.get("RssAnon", 0),
        sizes.get("RssShmem", 0) + sizes.get("RssFile", 0),
    )  # fmt: skip


def _parted(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def role(command: list[str]) -> str:
    """The roles that a command line gives its process; empty when it names none."""
    return "+".join(value for option, value in pairwise(command) if option == "--role")


def _is_ours(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "exe").readlink() == (PROC / "self" / "exe").readlink()
    except OSError:
        return False


def resident(pid: int) -> tuple[int, int]:
    """Bytes that the process holds now: counting shared pages in full (RSS), and its share of them (PSS); 0 where unknown."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    sizes = {name: int(text.split()[0]) * 1024 for name, _, text in map(_parted, lines) if text.endswith("kB")}
    return sizes.get("Rss", 0), sizes.get("Pss", 0)
