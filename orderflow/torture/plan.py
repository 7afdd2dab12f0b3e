"""What is done to the system and when: a pure function of the seed, the length, and of what can be done here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random

# The system comes up, and orders are under way, before the first fault.
FIRST_AT = 2.0
# Close enough together, by default, that one fault meets the recovery from another.
SHORTEST_GAP = 0.5
MEAN_GAP = 2.25


class Kind(StrEnum):
    """One kind of fault; its text is what people read."""

    KILL_API = "SIGKILL of an API process"
    KILL_PUBLISHER = "SIGKILL of a publisher"
    KILL_WORKER = "SIGKILL of a worker"
    KILL_ALL = "SIGKILL of every process at once"
    KILL_TWICE = "SIGKILL of a worker, and of its successor"
    PAUSE_WORKER = "SIGSTOP of a worker, then SIGCONT"
    POSTGRES_FAST = "PostgreSQL restart -m fast"
    POSTGRES_IMMEDIATE = "PostgreSQL restart -m immediate"
    POSTGRES_KILL = "SIGKILL of the postmaster, then start"
    POSTGRES_PAUSE = "SIGSTOP of all of PostgreSQL, then SIGCONT"
    BACKEND_KILL = "SIGKILL of a PostgreSQL backend"
    TERMINATE_ALL = "every PostgreSQL connection terminated"
    TERMINATE_LISTEN = "the LISTEN connection terminated"
    HALF_OPEN = "the LISTEN and lock connections half-open"
    NO_CONNECTION_LEFT = "no PostgreSQL connection left"
    READ_ONLY = "PostgreSQL read-only"
    DISK_FULL = "the disk of orders and outbox full"
    ORDERS_LOCKED = "orders locked"
    STATEMENTS_CANCELLED = "statements cancelled, as by a time-out"
    SERIALIZABLE = "every transaction serializable"
    DEADLOCKS = "row locks in opposing order"
    KAFKA_RESTART = "Kafka restart"
    KAFKA_KILL = "SIGKILL of Kafka, then start"
    KAFKA_PAUSE = "SIGSTOP of Kafka, then SIGCONT"
    KAFKA_WIPED = "Kafka's data wiped"
    TOPIC_DELETED = "the topic deleted"
    PARTITIONS_ADDED = "partitions added"
    OFFSETS_TO_EARLIEST = "offsets reset to the beginning"
    OFFSETS_TO_LATEST = "offsets reset to the end"
    GROUP_DELETED = "the consumer group deleted"
    LIMIT_LOWERED = "the topic's message limit lowered"
    ACKS_LOST = "what Kafka answers is lost"
    REBALANCES = "a rebalance every second"
    RECORDS_AGAIN = "the newest records again"
    RECORDS_LATE = "the oldest records again"
    RECORDS_REORDERED = "records again, backwards and elsewhere"
    RECORDS_AT_ONCE = "records to two partitions at once"
    RECORDS_FOREIGN = "records of unknown orders and types"
    RECORDS_POISONED = "10,000 poisoned records in a row"
    EVENT_TOO_LARGE = "an event too large for Kafka"
    GATEWAY_ERROR = "gateway mode error"
    GATEWAY_TIMEOUT = "gateway mode timeout"
    GATEWAY_HANG = "gateway mode hang"
    GATEWAY_UNAVAILABLE = "gateway mode unavailable"
    CLIENTS_DISCONNECT = "clients leave before the answer"
    CLIENTS_SLOW = "clients with slow bodies"
    CLIENTS_MANY = "2,000 connections"
    CLIENTS_OVERLOAD = "all the load that it takes, and more"


# The mock broker of `dev` keeps nothing, and has no administration.
OF_KAFKA = frozenset({
    Kind.KAFKA_RESTART, Kind.KAFKA_KILL, Kind.KAFKA_PAUSE, Kind.KAFKA_WIPED, Kind.TOPIC_DELETED, Kind.PARTITIONS_ADDED,
    Kind.OFFSETS_TO_EARLIEST, Kind.OFFSETS_TO_LATEST, Kind.GROUP_DELETED, Kind.LIMIT_LOWERED, Kind.ACKS_LOST,
})  # fmt: skip
# A file system of a limited size is mounted for it.
OF_ROOT = frozenset({Kind.DISK_FULL})
# For how long, in seconds, the short times more often than the long ones. A worker past its Kafka session of 6 s wakes as a
# zombie, a shorter stop goes unnoticed.
LASTING = {
    Kind.PAUSE_WORKER: (0.5, 30.0),
    Kind.POSTGRES_PAUSE: (1.0, 30.0),
    Kind.HALF_OPEN: (3.0, 15.0),
    Kind.NO_CONNECTION_LEFT: (0.5, 5.0),
    Kind.READ_ONLY: (0.5, 10.0),
    Kind.DISK_FULL: (0.5, 10.0),
    Kind.ORDERS_LOCKED: (0.5, 12.0),
    Kind.STATEMENTS_CANCELLED: (0.5, 5.0),
    Kind.SERIALIZABLE: (0.5, 5.0),
    Kind.DEADLOCKS: (1.0, 8.0),
    Kind.KAFKA_PAUSE: (1.0, 30.0),
    Kind.LIMIT_LOWERED: (2.0, 12.0),
    # Up to beyond the limit of a round, after which the publisher goes on with another producer.
    Kind.ACKS_LOST: (0.5, 15.0),
    Kind.REBALANCES: (2.0, 60.0),
    Kind.GATEWAY_ERROR: (0.5, 4.0),
    Kind.GATEWAY_TIMEOUT: (0.5, 4.0),
    Kind.GATEWAY_HANG: (0.5, 4.0),
    Kind.GATEWAY_UNAVAILABLE: (0.5, 30.0),
    Kind.CLIENTS_SLOW: (1.0, 12.0),
    Kind.CLIENTS_MANY: (1.0, 5.0),
    Kind.CLIENTS_OVERLOAD: (1.0, 8.0),
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


def plan(seed: int, seconds: float, *, every: float = MEAN_GAP, kinds: Collection[Kind] = tuple(Kind)) -> list[Fault]:
    """The faults of a run whose load lasts `seconds`, in the order of their times, of these kinds only.

    `every`: mean seconds from the beginning of one to that of the next, at least `SHORTEST_GAP`.

    Kinds come in shuffled decks: each has its turn before any has its second. What lasts is undone before the load ends,
    so that recovery happens under load.
    """
    random = Random(seed)
    faults: list[Fault] = []
    at = FIRST_AT
    for kind in _decks(random, [kind for kind in Kind if kind in kinds]):
        pick = random.randrange(1 << 16)
        shortest, longest = LASTING.get(kind, (0.0, 0.0))
        lasts = random.triangular(shortest, longest, shortest)
        gap = random.uniform(SHORTEST_GAP, 2 * every - SHORTEST_GAP)
        if at > seconds - SHORTEST_GAP:
            return faults
        faults.append(Fault(round(at, 2), kind, pick, round(min(lasts, max(0.1, seconds - at)), 2) if kind in LASTING else 0.0))
        at += gap
    raise ValueError("a plan needs a kind of fault at least")


def _decks(random: Random, kinds: list[Kind]) -> Iterator[Kind]:
    while kinds:
        deck = kinds.copy()
        random.shuffle(deck)
        yield from deck
