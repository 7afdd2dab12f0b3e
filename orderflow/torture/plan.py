"""What is done to the system and when: a pure function of the seed, the length, and whether the broker can be restarted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random

# The system comes up, and orders are under way, before the first fault.
FIRST_AT = 2.0
# Close enough together that one fault meets the recovery from another.
SHORTEST_GAP, LONGEST_GAP = 0.5, 3.0


class Kind(StrEnum):
    """One kind of fault; its text is what people read."""

    KILL_API = "SIGKILL of an API process"
    KILL_PUBLISHER = "SIGKILL of a publisher"
    KILL_WORKER = "SIGKILL of a worker"
    PAUSE_WORKER = "SIGSTOP of a worker, then SIGCONT"
    POSTGRES_FAST = "PostgreSQL restart -m fast"
    POSTGRES_IMMEDIATE = "PostgreSQL restart -m immediate"
    POSTGRES_KILL = "SIGKILL of the postmaster, then start"
    TERMINATE_ALL = "every PostgreSQL connection terminated"
    TERMINATE_LISTEN = "the LISTEN connection terminated"
    KAFKA_RESTART = "Kafka restart"
    KAFKA_KILL = "SIGKILL of Kafka, then start"
    GATEWAY_ERROR = "gateway mode error"
    GATEWAY_TIMEOUT = "gateway mode timeout"
    GATEWAY_HANG = "gateway mode hang"


OF_KAFKA = frozenset({Kind.KAFKA_RESTART, Kind.KAFKA_KILL})
# For how long, in seconds: a worker past its Kafka session of 10 s wakes as a zombie, a shorter stop goes unnoticed.
LASTING = {
    Kind.PAUSE_WORKER: (0.5, 14.0),
    Kind.GATEWAY_ERROR: (0.5, 4.0),
    Kind.GATEWAY_TIMEOUT: (0.5, 4.0),
    Kind.GATEWAY_HANG: (0.5, 4.0),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """`at` is seconds from the start of the load, `lasts` seconds until it is undone (0: nothing to undo).

    `pick` chooses among the processes that could be hit: the one at that index, modulo their number.
    """

    at: float
    kind: Kind
    pick: int = 0
    lasts: float = 0.0

    def __str__(self) -> str:
        lasting = f" for {self.lasts:.1f} s" if self.lasts else ""
        return f"{self.at:6.1f} s  {self.kind}{lasting}"


def plan(seed: int, seconds: float, *, broker_restarts: bool = True) -> list[Fault]:
    """The faults of a run whose load lasts `seconds`, in the order of their times.

    Kinds come in shuffled decks: each has its turn before any has its second. What lasts is undone before the load ends,
    so that recovery happens under load.
    """
    random = Random(seed)
    faults: list[Fault] = []
    at = FIRST_AT
    for kind in _decks(random, [kind for kind in Kind if broker_restarts or kind not in OF_KAFKA]):
        pick = random.randrange(1 << 16)
        lasts = random.uniform(*LASTING[kind]) if kind in LASTING else 0.0
        gap = random.uniform(SHORTEST_GAP, LONGEST_GAP)
        if at > seconds - SHORTEST_GAP:
            return faults
        faults.append(Fault(round(at, 2), kind, pick, round(min(lasts, max(0.1, seconds - at)), 2)))
        at += gap
    raise AssertionError("unreachable: the decks never end")


def _decks(random: Random, kinds: list[Kind]) -> Iterator[Kind]:
    while True:
        deck = kinds.copy()
        random.shuffle(deck)
        yield from deck
