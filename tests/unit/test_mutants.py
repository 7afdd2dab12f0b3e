"""The mutation gate's own parts: every mutant fits the program, the document lists them all, and no trial is misread."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.mutants import document
from tests.mutants.__main__ import QUICK, _chosen, main
from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Edit, Mutant, NotApplicable
from tests.mutants.trial import HANG, Broken, Case, Caught, Run, Survived, Verdict, attempt, judged

ROOT = Path(__file__).resolve().parent.parent.parent
every_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@every_mutant
def test_a_mutant_fits_the_program(mutant: Mutant) -> None:
    changed = mutant.mutated(ROOT)
    assert all(text != (ROOT / file).read_text("utf-8") for file, text in changed.items())


@every_mutant
def test_its_tests_exist(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, _, function = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}, test


def test_each_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40


def test_the_document_lists_exactly_these() -> None:
    rows = document.rows((ROOT / document.DOCUMENT).read_text("utf-8"))
    assert list(rows) == [mutant.name for mutant in MUTANTS], f"make mutants writes the table of {document.DOCUMENT}"
    for mutant in MUTANTS:
        *cells, caught_by = rows[mutant.name]
        again = f"its line is out of date: make mutants ARGS={mutant.name}"
        assert cells == [f"{mutant.safeguard} (`{mutant.name}`)", mutant.mutation, mutant.keeps], again
        assert caught_by.partition(" (")[0] in mutant.tests, again


def test_the_sample_is_a_function_of_its_seed() -> None:
    samples = [_chosen((), quick=True, seed=seed) for seed in (7, 7, 8)]
    assert samples[0] == samples[1] != samples[2]
    assert [len(sample) for sample in samples] == [QUICK] * 3


def test_names_are_chosen_and_an_unknown_one_is_refused() -> None:
    assert [mutant.name for mutant in _chosen(["poll", "heartbeat"], quick=False, seed=None)] == ["poll", "heartbeat"]
    refused = CliRunner().invoke(main, ["poll", "prayer"])
    assert refused.exit_code == 2
    assert "there is no mutant prayer: --list names them" in refused.output
    listed = CliRunner().invoke(main, ["--list"])
    assert [line.split()[0] for line in listed.output.splitlines()[1:]] == [mutant.name for mutant in MUTANTS]


GUARD = "def charge(made):\n    if made:\n        return made\n    return made + 1\n"
CHARGES = """
from program import charge

def test_it_is_charged_once():
    assert charge(charge(0)) == 1

def test_it_charges():
    assert charge(0) == 1

def test_it_ends():
    charge(1)
"""


def mutant(new: str, *tests: str, **options: object) -> Mutant:
    edit = Edit("orderflow/program.py", "    if made:\n", new)
    nodes = [f"test_charges.py::{test}" for test in tests]
    return Mutant("m", "s", "o", "k", [edit], nodes, **options)  # type: ignore[arg-type]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A program with one safeguard, and its tests."""
    for folder in ("orderflow", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "orderflow/program.py").write_text(GUARD)
    (tmp_path / "tests/test_charges.py").write_text(CHARGES)
    (tmp_path / "schema.sql").touch()
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["orderflow"]\n')
    return tmp_path


ONCE, OTHER, ENDS = "test_it_is_charged_once", "test_it_charges", "test_it_ends"
HANGING = "    while made:\n        pass\n    if made:\n"


@pytest.mark.parametrize(
    ("mutant", "verdict"),
    [
        (mutant("    if False:\n", OTHER, ONCE), Caught(f"test_charges.py::{ONCE}")),
        (mutant("    if False:\n", OTHER), Survived()),
        (mutant(HANGING, ENDS, timeout=1), Caught(f"test_charges.py::{ENDS}", HANG)),
        (mutant("    if nothing:\n", ONCE), "name 'nothing' is not defined"),
        (mutant("    if False:\n", "test_of_another_name"), "not found"),
    ],
    ids=["caught", "survived", "hangs", "another error", "no such test"],
)
async def test_a_trial_in_a_tree_of_its_own(tree: Path, mutant: Mutant, verdict: Verdict | str) -> None:
    found = await attempt(mutant, tree)
    if isinstance(verdict, str):
        assert isinstance(found, Broken)
        assert verdict in found.reason
    else:
        assert found == verdict
    assert (tree / "orderflow/program.py").read_text() == GUARD


NODE = f"test_charges::{ONCE}[a]"


@pytest.mark.parametrize(
    ("message", "how"),
    [
        ("assert 1 == 2\n  where", ""),
        ("AssertionError: no 1 x PAID", ""),
        ("Failed: DID NOT RAISE <class 'ValueError'>", ""),
        ("Failed: Timeout (>90.0s) from pytest-timeout.", HANG),
        ("TimeoutError", HANG),
        ("asyncpg.exceptions.CheckViolationError: refused", "CheckViolationError"),
        ("asyncpg.exceptions.PostgresSyntaxError: at or near", None),
        ("NameError: name 'x' is not defined", None),
        ("ModuleNotFoundError: No module named 'x'", None),
    ],
)
def test_a_failure_has_to_be_about_the_promise(message: str, how: str | None) -> None:
    verdict = judged(mutant("", ONCE, error="CheckViolationError"), Run(1, [Case(NODE, "failed", message)], ""))
    assert verdict == (Broken(f"{NODE}: {message}") if how is None else Caught(f"test_charges.py::{ONCE}", how))


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (Run(1, [Case(NODE, "error", "failed on setup")], ""), Broken(f"{NODE}: failed on setup")),
        (Run(0, [Case(NODE, "skipped", "no Java")], ""), Broken(f"{NODE} is skipped here: no Java")),
        (Run(0, [], "no tests ran"), Broken("no tests ran")),
        (Run(4, [], "ERROR: usage\n"), Broken("ERROR: usage")),
        (Run(None, [], ""), Caught(f"test_charges.py::{ONCE}", HANG)),
    ],
)
def test_what_did_not_run_says_nothing(run: Run, verdict: Verdict) -> None:
    assert judged(mutant("", ONCE), run) == verdict


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (Edit("orderflow/program.py", "nowhere", ""), "stands 0 times"),
        (Edit("orderflow/program.py", "made", "done"), "stands 4 times"),
        (Edit("orderflow/program.py", "    if made:", "if made:"), "does not compile"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(tree: Path, edit: Edit, why: str) -> None:
    with pytest.raises(NotApplicable, match=why):
        Mutant("m", "s", "o", "k", [edit], ["test_charges.py::x"]).mutated(tree)


EMPTY = f"# Title\n\n{document.BEGIN}\n{document.END}\n\nThe end.\n"


def test_a_run_writes_what_it_has_caught_and_keeps_the_rest() -> None:
    first, second = MUTANTS[:2]
    text = document.written(EMPTY, MUTANTS, {second.name: "b.py::y (hangs)"})
    text = document.written(text, MUTANTS, {first.name: "a.py::x"})
    assert {name: cells[-1] for name, cells in document.rows(text).items()} == {
        first.name: "a.py::x", second.name: "b.py::y (hangs)"
    }  # fmt: skip
    assert list(document.rows(text)) == [first.name, second.name]
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nThe end.\n")
    # Of a mutant that is gone, and of one that survived, nothing stays.
    assert document.rows(document.written(text, [second], {})).keys() == {second.name}
    assert document.rows(document.written(text, MUTANTS, {first.name: ""})).keys() == {second.name}


def test_a_document_without_the_marks_is_refused() -> None:
    with pytest.raises(document.NoMarks):
        document.rows("# Title\n")
