"""A mutant: the program with one safeguard switched off, and the tests that have to notice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class NotApplicable(Exception):
    """The program's text is no longer what the mutant changes; the text says where."""


@dataclass(frozen=True, slots=True)
class Edit:
    """`old`, which stands exactly once in `file` (from the top of the tree), becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """One safeguard, switched off.

    `mutation` says what is done, `keeps` which promise is at stake (I1 to I7 are what `orderflow audit` checks). `tests` are
    node ids below tests/, in the order in which they are run; one has to fail. `error`: the class of an exception by which it
    may fail besides an assertion, where the promise is that nothing is raised. `timeout`: seconds for one test.
    """

    name: str
    safeguard: str
    mutation: str
    keeps: str
    edits: Sequence[Edit]
    tests: Sequence[str]
    error: str = ""
    timeout: int = 90

    def mutated(self, root: Path) -> dict[str, str]:
        """The new text of each file that changes. Raises NotApplicable."""
        texts: dict[str, str] = {}
        for edit in self.edits:
            text = texts.get(edit.file) or (root / edit.file).read_text("utf-8")
            if (found := text.count(edit.old)) != 1:
                raise NotApplicable(f"{self.name}: stands {found} times in {edit.file}, not once: {edit.old!r}")
            texts[edit.file] = text.replace(edit.old, edit.new)
        for file, text in texts.items():
            if file.endswith(".py"):
                try:
                    compile(text, file, "exec")
                except SyntaxError as error:
                    raise NotApplicable(f"{self.name}: {file} does not compile: {error}") from None
        return texts

    def apply(self, root: Path) -> None:
        """Switch the safeguard off in the tree at `root`. Raises NotApplicable."""
        for file, text in self.mutated(root).items():
            (root / file).write_text(text, "utf-8")
