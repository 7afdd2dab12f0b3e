"""Trying one mutant: a copy of the tree, the safeguard switched off in it, its tests, and what their end means."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutant import Mutant

# What the tests run on: the program, and they themselves.
COPIED = ("orderflow", "tests", "schema.sql", "pyproject.toml")
# By node id, in the order given, and from nothing that an earlier run has left.
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly")
# Seconds for the servers of one run, besides its tests.
STARTING = 120

# The first line of a failure as pytest writes it: `assert 1 == 2`, `Failed: DID NOT RAISE`, `package.Error: text`.
_ERROR = re.compile(r"(?:[\w.]+\.)?([A-Za-z_]\w*)(?::|$)")
_ASSERTIONS = {"AssertionError", "Failed"}
_HANGS = {"TimeoutError", "Timeout"}
HANG = "hangs"


@dataclass(frozen=True, slots=True)
class Caught:
    """A test has noticed. `how`: "" by its assertion, `hangs`, or the class of the error that the mutant names."""

    test: str
    how: str = ""

    def __str__(self) -> str:
        return f"{self.test} ({self.how})" if self.how else self.test


@dataclass(frozen=True, slots=True)
class Survived:
    """No test has noticed: the safeguard is not tested, or there is none."""

    def __str__(self) -> str:
        return "SURVIVED"


@dataclass(frozen=True, slots=True)
class Broken:
    """The trial says nothing: the tests could not run, or one failed for another reason than the promise."""

    reason: str

    def __str__(self) -> str:
        return f"BROKEN: {self.reason}"


Verdict = Caught | Survived | Broken


class Case(NamedTuple):
    """One test as pytest's report has it. `outcome`: passed, failed, error (before or after the test itself) or skipped."""

    test: str
    outcome: str
    message: str


@dataclass(frozen=True, slots=True)
class Run:
    """What became of one run of pytest. `code` is None when it had to be killed."""

    code: int | None
    cases: list[Case]
    output: str


@contextlib.contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of what the tests need from the tree, for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="orderflow-mutant-", ignore_cleanup_errors=True) as directory:
        tree = Path(directory)
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(root / name, tree / name)
        yield tree


async def run(tree: Path, tests: Sequence[str], *options: str, timeout: int, limit: float) -> Run:
    """Run these tests in that tree: `timeout` seconds for each, `limit` seconds for all of it."""
    report = tree / "report.xml"
    command = (*PYTEST, *options, f"--timeout={timeout}", f"--junitxml={report}", *(f"tests/{test}" for test in tests))
    # First on the path, for the processes too that a test starts: the copy is what they have to run.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=tree, env=environment, start_new_session=True,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, code = b"", None
    try:
        async with asyncio.timeout(limit):
            output, _ = await process.communicate()
        code = process.returncode
    except TimeoutError:
        pass
    finally:
        # The embedded servers notice by themselves that whoever started them is gone.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return Run(code, list(_cases(report)), output.decode("utf-8", "replace"))


def _cases(report: Path) -> Iterator[Case]:
    if not report.exists():
        return
    for case in ElementTree.parse(report).iter("testcase"):
        test = "::".join((*case.get("classname", "").removeprefix("tests.").split("."), case.get("name", "")))
        for outcome, tag in (("failed", "failure"), ("error", "error"), ("skipped", "skipped")):
            if (found := case.find(tag)) is not None:
                yield Case(test, outcome, found.get("message", ""))
                break
        else:
            yield Case(test, "passed", "")


async def attempt(mutant: Mutant, root: Path) -> Verdict:
    """Switch the safeguard off in a copy of the tree at `root`, and see whether one of its tests notices."""
    with copied(root) as tree:
        mutant.apply(tree)
        limit = STARTING + mutant.timeout * len(mutant.tests)
        return judged(mutant, await run(tree, mutant.tests, "-x", timeout=mutant.timeout, limit=limit))


def judged(mutant: Mutant, run: Run) -> Verdict:
    """What the end of its tests says about a mutant."""
    for case in run.cases:
        if case.outcome == "failed":
            how = _how(mutant, case.message)
            if how is None:
                return Broken(f"{case.test}: {_first_line(case.message)}")
            return Caught(_named(mutant, case.test), how)
        if case.outcome == "error":
            return Broken(f"{case.test}: {_first_line(case.message)}")
        if case.outcome == "skipped":
            return Broken(f"{case.test} is skipped here: {_first_line(case.message)}")
    if run.code is None:
        # Too deep for the time limit of a test: a blocked event loop, or a fixture that waits for ever.
        return Caught(mutant.tests[min(len(run.cases), len(mutant.tests) - 1)], HANG)
    if run.code == 0 and run.cases:
        return Survived()
    return Broken(_complaint(run.output))


def _how(mutant: Mutant, message: str) -> str | None:
    """By what the test has failed; None where it says nothing about the promise."""
    first = _first_line(message)
    match = _ERROR.match(first)
    error = match[1] if match else ""
    if error in _HANGS or first.startswith("Failed: Timeout"):
        return HANG
    if first.startswith("assert ") or error in _ASSERTIONS:
        return ""
    return error if error and error == mutant.error else None


def _named(mutant: Mutant, case: str) -> str:
    """The test as the mutant names it, without its file's folder and its parameters."""
    function = case.rpartition("::")[2].partition("[")[0]
    return next((test for test in mutant.tests if test.partition("[")[0].endswith(f"::{function}")), mutant.tests[0])


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]


def _complaint(output: str) -> str:
    lines = output.strip().splitlines()
    return ([line for line in lines if line.startswith("ERROR")] or lines or ["pytest said nothing"])[-1][:200]
