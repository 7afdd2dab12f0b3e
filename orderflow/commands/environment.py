"""Where settings come from: what stands in the environment and in `.env`, and what there is nobody's setting.

Values are read by `orderflow.settings` alone; here it is the names that matter.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values

from orderflow.settings import Settings, environment_name

PREFIX = "ORDERFLOW_"
# Read by the tests, not by the program.
TESTS = "ORDERFLOW_TEST_"
DOTENV = Path(".env")


def names() -> dict[str, str]:
    """Every setting's environment name, by the setting's own name."""
    return {field: environment_name(field) for field in Settings.model_fields}


def given() -> dict[str, str]:
    """Where each environment name that is set stands: `environment` or `.env`, by the name in capitals."""
    found = {name.upper(): ".env" for name in (dotenv_values(DOTENV) if DOTENV.is_file() else {})}
    return found | {name.upper(): "environment" for name in os.environ}


def unknown(where: Mapping[str, str]) -> dict[str, str]:
    """Names that look like ours and are no setting, each with the name that was probably meant, or an empty text."""
    # Compared without the prefix: it is a large part of a short name, and would make everything look alike.
    known = {name.removeprefix(PREFIX): name for name in names().values()}
    ours = sorted(
        name for name in where if name.startswith(PREFIX) and not name.startswith(TESTS) and name not in known.values()
    )
    near = {name: difflib.get_close_matches(name.removeprefix(PREFIX), list(known), 1, 0.7) for name in ours}
    return {name: known[found[0]] if found else "" for name, found in near.items()}


def child_environment(changes: Mapping[str, str], *, inherit: bool = False) -> dict[str, str]:
    """The environment for a process of ours that is started with settings of its own.

    None of this process's settings reach it unless `inherit`; then they do where `changes` has no other value. The child
    finds this same orderflow, wherever it is started.
    """
    ours = set(names().values())
    kept = {
        name: value
        for name, value in os.environ.items()
        if inherit or (name.upper() not in ours and not name.upper().startswith(PREFIX))
    }
    path = [str(Path(__file__).parents[2]), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | dict(changes) | {"PYTHONPATH": os.pathsep.join(path)}
