"""`gradsplit report`: what a run file says, in the terminal and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import check_place, flag, option, page_if_possible, say

if TYPE_CHECKING:
    from ..watch.record import RunFile

__all__ = ["newest", "run"]


def newest() -> Path:
    """Return the run file in this folder that was written last, under the names of `gradsplit run`."""
    found = [path for path in Path().glob("run*.db") if ".rank" not in path.name and path.is_file()]
    return max(found, key=lambda path: (path.stat().st_mtime, path.name), default=Path("run.db"))


def run(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A run file, also of a run that goes on. Left out: the newest one here."),
    ] = None,
    html: Annotated[Path | None, option("FILE", "Where to write the page.", default="beside the run file")] = None,
    page: Annotated[bool, flag("--page/--no-page", "Whether to write the page.")] = True,
    jsonl: Annotated[Path | None, option("FILE", "Also write every step, as a line of JSON.", default="none")] = None,
    fail_on: Annotated[
        list[str] | None,
        option(
            "EVENT",
            "explosion, nonfinite or exception: end with code 1 if that happened. May be repeated.",
            default="none",
        ),
    ] = None,
) -> None:
    """Say what went wrong first in a recorded run, what followed, and what to change; write it as one HTML page.

    Example: gradsplit report run.db --fail-on explosion
    """
    from ..watch.record import RunFile, RunFileError
    from ..watch.report.account import FAILURES, account_of, fails_on
    from ..watch.report.text import report_text

    for word in fail_on or []:
        if word not in FAILURES:
            raise ValueError(f"gradsplit report --fail-on {word}: expected one of {', '.join(FAILURES)}.")
    check_place(html, "gradsplit report --html")
    check_place(jsonl, "gradsplit report --jsonl")
    file = newest() if file is None else file
    try:
        with RunFile(file) as opened:
            account = account_of(opened)
            if jsonl is not None:
                _write_lines(opened, jsonl)
    except RunFileError as error:
        raise ValueError(str(error)) from error
    say(report_text(account))
    if page:
        with page_if_possible():
            from ..watch.report.run_page import write_run_page

            typer.echo(f"\nPage: {write_run_page(account, html or file.with_suffix('.html'))}")
    failed = [word for word in fail_on or [] if fails_on(word, account)]
    if failed:
        typer.echo(
            f"gradsplit report: failed on {', '.join(f'{word} ({FAILURES[word]})' for word in failed)}", err=True
        )
        raise typer.Exit(1)


def _or_none(value: Any) -> Any:
    """What JSON knows: nothing in the place of nan."""
    return value if value == value else None


def _write_lines(opened: RunFile, place: Path) -> None:
    """Write numbers of which there is one per step, and the samples that stood out of its batch, where these were read.

    Norms of nodes are for the page and for `RunFile`.
    """
    from ..watch.report.samples import readings_of

    columns = ("step", "time", "loss", "lr", "own_scale", "skipped", "total", "given")
    with place.open("w", encoding="utf8") as out:
        for stream in opened.streams:
            series = opened.series(stream)
            remarks = [one for one in opened.meta.get("remarks", []) if one.get("stream", 0) == stream.index]
            read = {one.row: one for one in readings_of(remarks, 0)}
            table = zip(*(getattr(series, f"{name}_R").tolist() for name in columns), strict=True)
            for r, row in enumerate(table, series.first_row):
                values: dict[str, Any] = {name: _or_none(value) for name, value in zip(columns, row, strict=True)}
                if r in read:
                    keys = ("pass", "sample", "layer", "ratio", "num_layers")
                    rows = [dict(zip(keys, map(_or_none, each), strict=True)) for each in read[r].rows]
                    values["samples"] = rows
                out.write(json.dumps({"optimizer": stream.index, **values}) + "\n")
