"""The runs of one seed: of its whole plan, of a part of it, and of ever smaller parts that still fail."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orderflow.bench.program import ProgramFailed
from orderflow.bench.servers import Servers
from orderflow.embedded.errors import EmbeddedError
from orderflow.torture.detour import Detour
from orderflow.torture.driver import Driver, Extent
from orderflow.torture.plan import Fault
from orderflow.torture.report import Report
from orderflow.torture.shrink import shrink


class RunFailed(Exception):
    """Servers, program or load generator failed on their own account; the text says how to run it again."""


@dataclass(slots=True)
class Runs:
    """`kept` is where the last run that failed has its data and logs, with `keep` the last run of all."""

    seed: int
    plan: list[Fault]
    extent: Extent
    command: str
    embedded_broker: bool = False
    keep: bool = False
    kept: Path | None = None

    def again(self, part: Sequence[Fault]) -> str:
        """The command for that part of the plan."""
        numbers = [self.plan.index(fault) + 1 for fault in part]
        return self.command if len(part) == len(self.plan) else f"{self.command} --only {','.join(map(str, numbers))}"

    async def of(self, numbers: Sequence[int], tell: Callable[[float, str], None]) -> Report:
        """One run, with the faults at these indices. Raises RunFailed."""
        part = [self.plan[number] for number in numbers]
        directory = await asyncio.to_thread(_directory)
        kept = True
        # Kafka tells its clients where to connect: the port is known before it starts.
        detour = Detour()
        try:
            tell(0.0, "starting the servers")
            await detour.start()
            async with Servers(directory, embedded_broker=self.embedded_broker, detour=detour.port) as servers:
                report = await Driver(servers, detour, directory, self.seed, part, self.extent, tell).run()
            kept = self.keep or bool(report.problems)
        except asyncio.CancelledError:
            kept = self.keep
            raise
        except (ExceptionGroup, EmbeddedError, ProgramFailed) as error:
            reasons = "; ".join(dict.fromkeys(map(_reason, _leaves(error))))
            raise RunFailed(f"{reasons} (again with: {self.again(part)}; logs in {directory})") from error
        finally:
            await detour.stop()
            if kept:
                self.kept = directory
            else:
                await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        return report

    async def shrunk(self, failed: Report, tries: int, tell: Callable[[float, str], None]) -> Report:
        """The report of the smallest part of the plan that failed within `tries` runs. Raises RunFailed."""
        smallest, run = failed, 0

        async def fails(numbers: Sequence[int]) -> bool:
            nonlocal smallest, run
            run += 1
            text = f"run {run} of {tries}, {len(numbers)} of {len(self.plan)} faults"
            before = self.kept
            report = await self.of(numbers, lambda done, what: tell((run - 1 + done) / tries, f"{text}: {what}"))
            if report.problems:
                smallest = report
                if before is not None:
                    await asyncio.to_thread(shutil.rmtree, before, ignore_errors=True)
            return bool(report.problems)

        await shrink([self.plan.index(fault) for fault in failed.plan], fails, tries=tries)
        return smallest


def _directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="orderflow-torture-"))
    directory.chmod(0o711)  # as root, PostgreSQL runs as another user, who must get through
    return directory


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, EmbeddedError | ProgramFailed) else f"{type(error).__name__}: {error}"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error
