"""What this process can do right now: its roles' starts, its dependencies, and whether it is draining."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

POSTGRES: Final = "postgres"


class Health:
    """Collected by every role of the process, read by /readyz.

    `expected`: the roles that have to come up once before the process is ready; `all_up` is called when they have.
    """

    def __init__(self, expected: Iterable[str] = (), all_up: Callable[[], None] = lambda: None) -> None:
        self._all_up = all_up
        self.draining = False
        self._missing = set(expected)
        self._dependencies: dict[str, tuple[bool, str]] = {}
        # What the auditor has found last, in whichever process it is; None before the first result is seen. It decides nothing.
        self.audited: dict[str, Any] | None = None

    def set(self, dependency: str, up: bool, detail: str = "") -> None:
        """Note how a dependency was found; `detail` says for people why it is down."""
        self._dependencies[dependency] = (up, detail)

    def reaches(self, dependency: str) -> bool:
        """Whether the dependency was found up the last time."""
        return self._dependencies.get(dependency, (False, ""))[0]

    def started(self, role: str) -> None:
        """Note that a role has come up; a later crash and restart does not take that back."""
        if role in self._missing:
            self._missing.discard(role)
            if not self._missing:
                self._all_up()

    @property
    def status(self) -> str:
        """`draining`, `starting`, `unavailable` (PostgreSQL is down) or `ready`.

        Kafka's state is shown and does not count: orders are accepted without it, and published later.
        """
        if self.draining:
            return "draining"
        if self._missing:
            return "starting"
        return "ready" if self.reaches(POSTGRES) else "unavailable"

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.status == "ready"

    def snapshot(self) -> dict[str, Any]:
        """`{"status": ..., "dependencies": {name: {"state": "up" | "down", "detail": text}}}`, and `audit` if there was one."""
        return {
            "status": self.status,
            "dependencies": {
                name: {"state": "up" if up else "down", "detail": detail}
                for name, (up, detail) in sorted(self._dependencies.items())
            },
            **({"audit": self.audited} if self.audited else {}),
        }
