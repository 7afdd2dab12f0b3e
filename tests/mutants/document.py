"""The table of the safeguards in docs/guarantees.md, between two marks: read, and written anew by a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tests.mutants.mutant import Mutant

DOCUMENT = "docs/guarantees.md"
BEGIN = "<!-- mutants: written by `make mutants` -->"
END = "<!-- end of mutants -->"
HEAD = ("| safeguard | switched off | keeps | caught by |", "|---|---|---|---|")
_NAME = re.compile(r"\(`([a-z0-9-]+)`\)$")


class NoMarks(ValueError):
    """The document has no place for the table."""


def row(mutant: Mutant, caught_by: str) -> str:
    """The mutant's line of the table."""
    cells = (f"{mutant.safeguard} (`{mutant.name}`)", mutant.mutation, mutant.keeps, caught_by)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """The cells of each line of the table, by the mutant's name. Raises NoMarks."""
    found = {}
    for line in _between(text).splitlines():
        cells = tuple(cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        if cells and (name := _NAME.search(cells[0])):
            found[name[1]] = cells
    return found


def written(text: str, mutants: Iterable[Mutant], caught: Mapping[str, str]) -> str:
    """The document with a line for each mutant that was caught by this run, or by an earlier one.

    `caught`: by what, for each that was tried; "" for one that was not caught, which loses its line. Raises NoMarks.
    """
    by = {name: cells[-1] for name, cells in rows(text).items()} | caught
    lines = [row(mutant, by[mutant.name]) for mutant in mutants if by.get(mutant.name)]
    before, _, rest = text.partition(BEGIN)
    return "\n".join((before + BEGIN, "", *HEAD, *lines, "", END)) + rest.partition(END)[2]


def _between(text: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise NoMarks(f"{DOCUMENT} has to have {BEGIN} and {END}, once and in this order")
    return text.partition(BEGIN)[2].partition(END)[0]
