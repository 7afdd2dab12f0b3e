"""Every mutant, in the order of an order's way through the program."""

from __future__ import annotations

from typing import Final

from tests.mutants import delivering, guarding, paying, placing, publishing, tables, upkeep, waking

MUTANTS: Final = (
    *placing.MUTANTS, *tables.MUTANTS, *publishing.MUTANTS, *waking.MUTANTS, *delivering.MUTANTS, *paying.MUTANTS,
    *upkeep.MUTANTS, *guarding.MUTANTS,
)  # fmt: skip
