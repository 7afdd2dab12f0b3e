"""Progress of a real command: a bar for a person at a terminal, and nothing for a script."""

from __future__ import annotations

import subprocess
import sys
from typing import IO, Any

import orjson
import pytest

from orderflow.audit import INVARIANTS
from orderflow.commands.progress import ERASE_LINE
from tests.programs import ROOT
from tests.rows import one_database
from tests.terminals import Terminal

database_url = one_database


def audited(url: str, *options: str, stderr: int | IO[Any]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        (sys.executable, "-m", "orderflow", "audit", "--database-url", url, *options),
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, timeout=60, check=True,
    )  # fmt: skip


def test_a_terminal_shows_each_invariant_in_its_turn(database_url: str) -> None:
    with Terminal(200) as terminal:
        result = audited(database_url, "--json", stderr=terminal.descriptor)
    # What a script reads is the same as ever.
    assert [finding["invariant"] for finding in orjson.loads(result.stdout)] == [i.name for i in INVARIANTS]
    assert [line.partition("%  ")[2] for line in terminal.lines] == [f"{i.name}: {i.text}" for i in INVARIANTS]
    assert all(line.startswith("auditing [") for line in terminal.lines)
    assert terminal.text.endswith(ERASE_LINE)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_without_a_terminal_there_is_nothing_of_it(database_url: str, options: tuple[str, ...]) -> None:
    result = audited(database_url, *options, stderr=subprocess.PIPE)
    assert result.stderr == b""
    assert b"auditing" not in result.stdout
    assert b"\r" not in result.stdout
