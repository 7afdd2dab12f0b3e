"""What it costs when the gateway gives no answers: promises of docs/guarantees.md that need nothing but its mode."""

from __future__ import annotations

import asyncio
import time

from orderflow.torture.stage import PATIENCE, SPLIT, STILL, Measured, Stage

CHARGED = 50

_MODE = "UPDATE gateway_control SET mode = $1, changed_at = now()"
_CHARGES = "SELECT count(*) FROM gateway_charges"
_PENDING_CHARGED = """
SELECT count(*) FROM orders o WHERE state = 'PAYMENT_PENDING' AND EXISTS (SELECT FROM gateway_charges WHERE reference = o.id)
"""
_FAILED_CHARGED = """
SELECT count(*) FROM orders o
WHERE state = 'FAILED' AND EXISTS (SELECT FROM gateway_charges WHERE reference = o.id AND status = 'settled')
"""
_WAITING = "SELECT array_agg(id) FROM orders WHERE in_flight"
_FAILED_BY_ERROR = "SELECT count(*) FROM orders WHERE state = 'FAILED' AND failure = 'error'"
_ATTEMPTS_USED = "SELECT count(*) FROM outbox WHERE failures IS NOT NULL OR attempt > first_attempt"


async def unknown(stage: Stage) -> Measured:
    """Orders that are FAILED with a charge behind them, when the answer was lost and the gateway cannot be asked either."""
    async with stage.running(*SPLIT, settings={"ORDERFLOW_GATEWAY_TIMEOUT_MS": "2000"}) as play:
        await play.ask(_MODE, "timeout")
        async with play.load(rate=100):
            await play.until(lambda: play.at_least(_CHARGES, CHARGED))
            await play.ask(_MODE, "unavailable")
            await asyncio.sleep(5 if stage.quick else 30)
        pending, failed = await play.ask(_PENDING_CHARGED), await play.ask(_FAILED_CHARGED)
        await play.ask(_MODE, "random")
        return Measured(
            failed, f"{pending} PENDING with a charge behind them meanwhile, all of them PAID when it could be asked"
        )


async def unavailable(stage: Stage) -> Measured:
    """Orders that failed for it, or used up an attempt, while a gateway was away under load."""
    away = 8.0 if stage.quick else 300.0
    async with stage.running(*SPLIT) as play:
        async with play.load(rate=50):
            await play.until(lambda: play.at_least(_CHARGES, CHARGED))
            await play.ask(_MODE, "unavailable")
            await asyncio.sleep(away)
            calls, waiting = play.facts("GATEWAY_UNANSWERED"), await play.ask(_WAITING) or []
            back = time.time()
            await play.ask(_MODE, "random")

        took = await play.until(lambda: play.none(STILL, waiting), patience=PATIENCE * 2) - back
        failed, used = await play.ask(_FAILED_BY_ERROR), await play.ask(_ATTEMPTS_USED)
        return Measured(
            failed,
            f"away {away:.0f} s: {calls} calls for the {len(waiting):,} orders that waited at its end, {used} events used up "
            f"an attempt; the last of these orders ended {took:.0f} s after its return",
        )
