"""A progress bar on stderr, with what it is at beside it; for what can take longer than a second."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import click

from orderflow.commands.output import escaped

# So much of the whole is done, from 0 to 1, and this is what it is at now.
Tell = Callable[[float, str], None]

STEPS: Final = 1000
WIDTH: Final = 20
# Around label and bar: brackets, the percentage, and the last column, in which a cursor would wrap the line.
FRAME: Final = len(" []  100%  ") + 1
FALLBACK_COLUMNS: Final = 80
ERASE_LINE: Final = "\r\x1b[K\x1b[?25h"  # and show the cursor, which the bar hides


@contextmanager
def progress(what: str) -> Iterator[Tell]:
    """Yields `tell(done, text)`. The bar appears with the first call, and nothing of it is left at the end.

    Where stderr is no terminal, nothing is written at all. The bar never goes back.
    """
    if not sys.stderr.isatty():
        yield lambda done, text: None
        return
    bar = click.progressbar(
        length=STEPS, label=what, width=WIDTH, show_eta=False, show_percent=True, item_show_func=_fitting(what),
        bar_template="%(label)s [%(bar)s]  %(info)s", update_min_steps=0, file=sys.stderr,
    )  # fmt: skip

    def tell(done: float, text: str) -> None:
        # The last step is the end of the block: a bar that has been full says 100 % for ever.
        reached = min(int(done * STEPS), STEPS - 1)
        bar.update(max(0, reached - bar.pos), text)

    try:
        yield tell
    finally:
        # What is printed next, an error too, begins in a line of its own.
        if bar.current_item is not None:
            click.echo(ERASE_LINE, file=sys.stderr, nl=False)


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`, for `total` things of the same kind."""
    done = 0
    with progress(what) as tell:

        def advance(n: int) -> None:
            nonlocal done
            done += n
            tell(done / total, f"{done:,} of {total:,}")

        yield advance


def _fitting(what: str) -> Callable[[str | None], str]:
    """Cuts a text to what the terminal's line has left: a line that wraps could not be written over."""

    def shown(text: str | None) -> str:
        return escaped(text or "")[: max(0, columns() - len(what) - WIDTH - FRAME)]

    return shown


def columns() -> int:
    """The width of the terminal that stderr is."""
    try:
        found = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        found = 0
    return found or FALLBACK_COLUMNS
