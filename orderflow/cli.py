"""The `orderflow` command: what there is, how it is found, and how errors reach people.

A command's module is imported when the command runs and not before: `orderflow --help` costs no server library.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from orderflow import __version__

DONE = 0
FAILED = 1
WRONG_USAGE = 2
# What a shell reports for a program that ended by SIGINT, and by SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141

# section -> command -> (module:attribute, the line in the help, which stands here so that it needs no import).
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Run": {
        "dev": ("dev:dev", "Everything on this machine, servers included."),
        "run": ("run:run", "All roles, some, or many processes of each."),
        "migrate": ("migrate:migrate", "Create or upgrade the schema; safe to run twice."),
    },
    "Look": {
        "orders": ("orders:orders", "List orders, show one."),
        "explain": ("explain:explain", "One order's whole story, with the time it took."),
        "doctor": ("doctor:doctor", "What is wrong here, and what to do about it."),
        "settings": ("settings:settings", "Every setting, its value and where that comes from."),
    },
    "Mend": {
        "dead-letters": ("dead_letters:dead_letters", "List, show, redrive or discard events that failed."),
        "events": ("events:events", "Publish chosen events again."),
        "gateway": ("gateway:gateway", "Switch the simulated gateway's behaviour."),
        "keys": ("keys:keys", "Make API keys."),
    },
    "Check": {
        "audit": ("audit:audit", "Check every invariant over the whole database."),
        "demo": ("demo:demo", "Walk an order through everything and check each step."),
        "bench": ("bench:bench", "The benchmarks of the README."),
        "torture": ("torture:torture", "Load, crashes and faults, then the audit."),
    },
}

EXAMPLES = (
    ("orderflow dev", "nothing to set up"),
    ("orderflow run --api 2 --publisher 1 --worker 4", "seven processes, watched"),
    ("orderflow explain ORDER-ID", "what took so long?"),
    ("orderflow dead-letters redrive --all", "the gateway is back"),
    ("orderflow audit && echo sound", "nothing lost, nothing twice"),
)


class ClosedOutput(Exception):
    """Nobody reads our stdout any more; not an OSError, which click would end with an exit code of its own."""


class Program(click.Group):
    """Lazy commands, a help page in sections, and the one place where errors become lines and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command's name, in the order of the help page."""
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None when there is no such command."""
        for section in COMMANDS.values():
            if cmd_name in section:
                name, _, attribute = section[cmd_name][0].partition(":")
                module = importlib.import_module(f"orderflow.commands.{name}")
                command: click.Command = getattr(module, attribute)
                return command
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, with the nearest name when there is no such command."""
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            near = nearest(args[0], self.list_commands(ctx))
            hint = f": did you mean {near!r}?" if near else ""
            raise click.UsageError(f"there is no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sections of the help page, from COMMANDS alone."""
        width = max(len(name) for name in self.list_commands(ctx))
        for title, section in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, (_, line) in section.items()])
        with formatter.section("Examples"):
            formatter.write_dl(EXAMPLES, col_max=50)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises ClosedOutput where stdout was closed, as `| head` does."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            raise ClosedOutput from None
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run and leave with an exit code; errors that people can act on become one line on stderr."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        debug = "--debug" in given[:end]
        # Whoever sees an error adds the flag to the end of the line: it is taken from anywhere.
        given = [word for word in given[:end] if word != "--debug"] + given[end:]
        if hasattr(sys.stdout, "reconfigure"):
            # A name in a script that the terminal's encoding lacks must not end a listing half-way.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code: object = super().main(
                given,
                prog_name or "orderflow",
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except Exception as error:
            if debug and not isinstance(error, ClosedOutput):
                click.echo(_without_secrets(traceback.format_exc()), err=True, nl=False)
            code, line = explained(error)
            if line:
                click.echo(f"orderflow: {_without_secrets(line)}", err=True)
        sys.exit(code if isinstance(code, int) else DONE)


def nearest(word: str, names: Sequence[str]) -> str | None:
    """The name that `word` was probably meant to be."""
    import difflib

    return next(iter(difflib.get_close_matches(word, names, 1, 0.6)), None)


def explained(error: Exception) -> tuple[int, str]:
    """The exit code for an error that ended a command, and the line for people, empty where silence is right.

    An error that nobody foresaw is named with its type and the way to see its traceback.
    """
    if isinstance(error, ClosedOutput):
        # The interpreter flushes stdout once more on its way out; that must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE, ""
    if isinstance(error, click.Abort):
        interrupted = isinstance(error.__cause__, KeyboardInterrupt)
        return (INTERRUPTED, "") if interrupted else (FAILED, "nothing was changed")
    if isinstance(error, click.UsageError):
        where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        return WRONG_USAGE, _one_line(error.format_message()).rstrip(".") + where
    if isinstance(error, click.ClickException):
        return error.exit_code, _one_line(error.format_message())

    from orderflow.engine.patience import DependencyUnavailable, Misconfigured
    from orderflow.settings import SettingsError

    if isinstance(error, SettingsError):
        return WRONG_USAGE, _one_line(str(error))
    if isinstance(error, DependencyUnavailable | Misconfigured):
        return FAILED, _one_line(str(error))
    if isinstance(error, ModuleNotFoundError):
        return (
            FAILED,
            f"{error.name} is not installed: in a checkout `make run` installs it (--debug shows who needs it)",
        )
    return FAILED, _one_line(f"{type(error).__name__}: {error} (--debug shows the traceback)")


def _without_secrets(text: str) -> str:
    """Errors that nobody foresaw, and those of libraries, may quote an address with its password."""
    from orderflow.settings import SettingsError, load, masked, without_secrets

    try:
        return without_secrets(text, load())
    except SettingsError:
        return masked(text)


def _one_line(text: str) -> str:
    from orderflow.commands.output import escaped

    return escaped(" ".join(text.split()))


@click.group(
    "orderflow",
    cls=Program,
    epilog="Settings come from flags, then the environment, then .env; `orderflow settings` lists them.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, message="orderflow %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Orders in, payments out, nothing lost, nothing twice.

    A transactional outbox on PostgreSQL and Kafka, in one program: HTTP API, publisher and worker.
    """


def main() -> NoReturn:
    """Entry point of the console script."""
    cli.main()
