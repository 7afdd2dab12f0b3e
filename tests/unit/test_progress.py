"""The progress bar: on a terminal only, of one line, forwards, and gone at the end."""

from __future__ import annotations

import re
import sys

import pytest

from orderflow.commands.progress import ERASE_LINE, counting, progress
from orderflow.torture import driver
from tests.terminals import Terminal


def test_a_terminal_shows_how_far_it_is_and_what_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal() as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with progress("bench") as tell:
            tell(0.0, "starting the servers")
            tell(0.5, "round 1 of 2: B, pgbench")
    assert terminal.lines == [
        "bench [--------------------]    0%  starting the servers",
        "bench [##########----------]   50%  round 1 of 2: B, pgbench",
    ]
    assert terminal.text.endswith(ERASE_LINE)


def test_things_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal() as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with counting("replaying", 3000) as advance:
            advance(1000)
            advance(2000)
    assert [line.rpartition("%  ")[2] for line in terminal.lines] == ["1,000 of 3,000", "3,000 of 3,000"]


def test_a_bar_is_gone_before_an_error_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        with progress("bench") as tell:
            tell(0.2, "E1")
            raise ValueError("broken")

    with Terminal() as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with pytest.raises(ValueError, match="broken"):
            broken()
    assert terminal.text.endswith(ERASE_LINE)


def test_it_never_goes_back_and_is_not_full_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal() as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with progress("x") as tell:
            for done in (0.4, 0.1, 1.0, 2.0, 0.9):
                tell(done, str(done))
    assert [int(re.findall(r"(\d+)%", line)[0]) for line in terminal.lines] == [40, 40, 99, 99, 99]


@pytest.mark.parametrize("columns", [20, 50, 80, 200])
def test_it_stays_in_its_line_and_escapes_what_would_not(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal(columns) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with progress("torture") as tell:
            tell(0.3, "kill \x1b[2J\n" * 50)
    assert "\x1b[2J" not in terminal.text
    assert len(terminal.lines) == 1
    # Label, bar and percentage are never cut: a terminal narrower than those wraps.
    assert len(terminal.lines[0]) < max(columns, 40)


def test_nothing_is_shown_before_the_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal() as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with progress("fetching Apache Kafka"):
            pass
    assert terminal.text == ""


def test_nothing_is_written_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("bench") as tell, counting("replaying", 2) as advance:
        tell(0.5, "half of it")
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_the_parts_of_a_torture_follow_each_other() -> None:
    assert 0.0 < driver.LOAD_SHARE < driver.AUDIT_FROM < 1.0
