"""From the table of commands to a typer application that imports one of them, and how commands say what is wrong."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import gradsplit

__all__ = ["at_least", "check_place", "flag", "option", "page_if_possible", "run_app", "say", "wrapped", "write_file"]

_HELP = """Split the gradient into bins, and bound each bin by a budget of its own.

Example: gradsplit run --watch train.py

See it work with `gradsplit demo`. On a script of yours, begin with `gradsplit run` and `gradsplit report`.
`gradsplit COMMAND --help` explains a command.
"""


def _help_text(command: Any, ctx: Any, formatter: Any) -> None:
    """Write one sentence, one example, the usage, the rest of the words, and the options by what they are for.

    An option names its group by `rich_help_panel`, and its unit by `metavar`.
    """
    words = inspect.cleandoc(command.help or "").split("\n\n")
    example = [part for part in words if part.startswith("Example: ")]
    for part in [words[0], *example]:
        formatter.write_text(" ".join(part.split()))
        formatter.write_paragraph()
    command.format_usage(ctx, formatter)
    for part in words[1:]:
        if part not in example:
            formatter.write_paragraph()
            formatter.write_text(" ".join(part.split()))
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        heading = "Arguments" if param.param_type_name == "argument" else param.rich_help_panel or "Other options"
        groups.setdefault(heading, []).append(_help_line(param))
    others = groups.pop("Other options", [])
    groups["Other options" if set(groups) - {"Arguments"} else "Options"] = others
    for heading, lines in groups.items():
        with formatter.section(heading):
            formatter.write_dl(lines, col_max=26)


def _help_line(param: Any) -> tuple[str, str]:
    """What is written of a parameter: its names and its unit; its words and its default."""
    if param.param_type_name == "argument":
        return param.metavar, param.help
    name = " / ".join([*param.opts, *param.secondary_opts])
    default = param.show_default if isinstance(param.show_default, str) else param.default
    if param.is_flag:
        default = param.opts[0] if param.secondary_opts else None
    elif isinstance(default, float):
        default = f"{default:g}"
    shown = "" if default in (None, "") or callable(default) else f" [default: {default}]"
    return name if param.is_flag else f"{name} {param.metavar}", f"{param.help}{shown}"


class _Command(TyperCommand):
    """A command whose help begins with a sentence and an example, and that says when it was interrupted."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        _help_text(self, ctx, formatter)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Name arguments as the help does; one that may be left out stands in brackets."""
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        named = (str(one.metavar) for one in arguments)
        return ["[OPTIONS]", *(n if one.required else f"[{n}]" for n, one in zip(named, arguments, strict=True))]

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read the arguments; a value of the wrong kind is named with its option."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            param = getattr(error, "param", None)
            if param is None or type(error).__name__ != "BadParameter":
                raise
            said = str(getattr(error, "message", error))
            kind = "a whole number" if "integer" in said else "a number" if re.search("number|float", said) else said
            value = self.make_parser(ctx).parse_args(given)[0].get(param.name)
            raise ValueError(
                f"{ctx.command_path} {param.opts[0]} {value}: expected {kind}. `{ctx.command_path} --help` says more."
            ) from None

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interruption by the user ends with code 130 and one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupted:
            typer.echo(f"\n{ctx.command_path}: interrupted{'; ' * bool(str(interrupted))}{interrupted}.", err=True)
            raise typer.Exit(130) from None


class _Group(TyperGroup):
    """The list of commands, under a sentence and an example."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help and the list."""
        _help_text(self, ctx, formatter)
        named = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.short_help or "") for name, command in named if command])


def run_app(commands: Mapping[str, tuple[str, str]], arguments: list[str]) -> None:
    """Parse the arguments and run the command they name.

    A wrong argument ends the process with code 2 and one message; with GRADSPLIT_DEBUG=1 it shows where it arose.
    """
    app = typer.Typer(
        cls=_Group, help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )  # fmt: skip
    app.callback()(_version)
    asked = next((word for word in arguments if not word.startswith("-")), "")
    for name, (module, summary) in commands.items():
        if name != asked:  # listed only
            app.command(name, short_help=summary)(_listed)
            continue
        loaded = importlib.import_module(f"gradsplit.cli.{module}")
        # A command that passes arguments on (a user's script) says so in its own CONTEXT.
        made = app.command(name, cls=_Command, short_help=summary, context_settings=getattr(loaded, "CONTEXT", None))
        made(loaded.run)
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


def check_place(place: Path | None, option: str) -> None:
    """Refuse a file that cannot be written, before anything is computed.

    Raises:
        ValueError: its folder is missing or may not be written to, or it is a folder; the text names the option.
    """
    if place is None:
        return
    folder = place.absolute().parent
    why = "a folder" if place.is_dir() else f"no folder {folder}" if not folder.is_dir() else ""
    if not why and not os.access(place if place.exists() else folder, os.W_OK):
        why = "one without the right to write"
    if why:
        raise ValueError(f"{option} {place}: expected a file that can be written, got {why}. Choose another place.")


def write_file(place: Path, text: str) -> None:
    """Write a whole file or none: an interruption or a full disk leaves what was there before."""
    if place.exists() and not place.is_file():  # such as a pipe, which nothing may stand in for
        place.write_text(text, encoding="utf8")
        return
    part = place.with_name(f"{place.name}.part")
    try:
        part.write_text(text, encoding="utf8")
        part.replace(place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def at_least(least: float, value: float, option: str) -> None:
    """Refuse a number that is too small.

    Raises:
        ValueError: the text names the option, the value and the rule.
    """
    if not value >= least:
        raise ValueError(f"{option} {value:g}: expected a number >= {least:g}. Leave it out for the default.")


def option(unit: str, words: str, group: str | None = None, default: str | bool = True) -> Any:
    """An option with a value: its unit, what it means, its group in the help, and its default in words."""
    return typer.Option(metavar=unit, help=words, rich_help_panel=group, show_default=default)


def flag(name: str, words: str, group: str | None = None) -> Any:
    """An option without a value."""
    return typer.Option(name, help=words, rich_help_panel=group)


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
    except KeyboardInterrupt:  # before a command began
        sys.exit(130)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if type(error).__module__ not in ("builtins", "gradsplit.lab.task"):
            raise
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        named = told if told.startswith("gradsplit ") else f"gradsplit: {told}"
        typer.secho(named, fg="red", err=True)
        if not isinstance(error, ValueError):
            typer.echo("GRADSPLIT_DEBUG=1 shows where it arose.", err=True)
        sys.exit(2)
