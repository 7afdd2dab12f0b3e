"""Each fault of a plan, done to the processes and servers of one run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orderflow.bench.load import Summary
from orderflow.torture.client_faults import ClientFaults
from orderflow.torture.grounds import Action, Grounds
from orderflow.torture.kafka_faults import KafkaFaults
from orderflow.torture.plan import Fault, Kind
from orderflow.torture.postgres_faults import PostgresFaults
from orderflow.torture.process_faults import ProcessFaults
from orderflow.torture.record_faults import RecordFaults

_SET_MODE = """
INSERT INTO gateway_control (mode) VALUES ($1)
ON CONFLICT (only_row) DO UPDATE SET mode = excluded.mode, changed_at = now()
"""


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that was done: `began` and `ended` are seconds from the start of the load, `what` says whom it met."""

    fault: Fault
    began: float
    ended: float
    what: str


class Faults:
    """Does what a plan says. Faults of one server wait for each other; everything else overlaps as the plan has it.

    `heard` is told what the clients of a fault came to.
    """

    def __init__(self, grounds: Grounds, heard: Callable[[Summary], None]) -> None:
        self._postgres = PostgresFaults(grounds)
        self._gateway_turn = asyncio.Lock()
        self.actions: Mapping[Kind, Action] = {
            **ProcessFaults(grounds).actions,
            **self._postgres.actions,
            **KafkaFaults(grounds).actions,
            **RecordFaults(grounds).actions,
            **ClientFaults(grounds, heard).actions,
            Kind.GATEWAY_ERROR: self._gateway,
            Kind.GATEWAY_TIMEOUT: self._gateway,
            Kind.GATEWAY_HANG: self._gateway,
            Kind.GATEWAY_UNAVAILABLE: self._gateway,
        }

    async def inject(self, fault: Fault, load_began: float) -> Injected:
        """Do it, and undo it after its time; `load_began` is monotonic.

        Raises EmbeddedError when a server does not come back.
        """
        began = time.monotonic()
        what = await self.actions[fault.kind](fault)
        return Injected(fault, began - load_began, time.monotonic() - load_began, what)

    async def _gateway(self, fault: Fault) -> str:
        mode = fault.kind.removeprefix("gateway mode ")
        async with self._gateway_turn:
            try:
                await self._postgres.ask(_SET_MODE, mode)
                await asyncio.sleep(fault.lasts)
            finally:
                await self._postgres.ask(_SET_MODE, "random")
        return "then random again"
