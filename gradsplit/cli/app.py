"""From the table of commands to a typer application that imports one of them, and how commands say what is wrong."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

import gradsplit

__all__ = ["page_if_possible", "run_app", "say", "wrapped"]

_HELP = """Split the gradient into bins, and bound each bin by a budget of its own.

See it work with `gradsplit demo`. On a script of yours, begin with `gradsplit run` and `gradsplit report`.

Example: gradsplit run --watch train.py
"""


def run_app(commands: Mapping[str, tuple[str, str]], arguments: list[str]) -> None:
    """Parse the arguments and run the command they name.

    A wrong argument ends the process with code 2 and one message; with GRADSPLIT_DEBUG=1 it shows where it arose.
    """
    app = typer.Typer(
        help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )
    app.callback()(_version)
    asked = next((word for word in arguments if not word.startswith("-")), "")
    for name, (module, summary) in commands.items():
        if name != asked:  # listed only
            app.command(name, help=summary)(_listed)
            continue
        loaded = importlib.import_module(f"gradsplit.cli.{module}")
        # A command that passes arguments on (a user's script) says so in its own CONTEXT.
        app.command(name, context_settings=getattr(loaded, "CONTEXT", None))(loaded.run)
    _teaching(lambda: app(arguments, prog_name="gradsplit"))


@contextmanager
def page_if_possible() -> Iterator[None]:
    """Write a page in this context; where plotly is missing, say so and go on."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        typer.echo("no page: it needs the package plotly; run: pip install plotly", err=True)


def say(text: str) -> None:
    """Print text; in a terminal, break its sentences at the width of the window."""
    typer.echo(wrapped(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text)


def wrapped(text: str, width: int) -> str:
    r"""Break long sentences between words; a row of a table and a command to copy stay on one line.

    >>> print(wrapped("one two three\n  a    1    2", 8))
    one two
    three
      a    1    2
    """

    def filled(line: str) -> str:
        words = line.lstrip()
        if len(line) <= width or len(re.findall("  +", words)) > 1 or words.startswith("gradsplit run"):
            return line
        indent = line[: len(line) - len(words)]
        made = textwrap.wrap(words, width - len(indent), break_long_words=False, break_on_hyphens=False)
        return "\n".join(indent + part for part in made)

    return "\n".join(map(filled, text.split("\n")))


def _listed() -> None:
    """Stand for a command whose module is not needed now."""


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"gradsplit {gradsplit.__version__}")
        raise typer.Exit


def _version(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_show_version, is_eager=True),
) -> None:
    """Hold the options that come before a command."""


def _teaching(call: Callable[[], Any]) -> None:
    """Show our own errors as one message: they say what was wrong, the rule and the remedy."""
    if os.environ.get("GRADSPLIT_DEBUG"):
        call()
        return
    try:
        call()
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; what is finished is kept", err=True)
        sys.exit(130)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if type(error).__module__ not in ("builtins", "gradsplit.lab.task"):
            raise
        typer.secho(f"gradsplit: {error}", fg="red", err=True)
        if not isinstance(error, ValueError):
            typer.echo("GRADSPLIT_DEBUG=1 shows where it arose.", err=True)
        sys.exit(2)
