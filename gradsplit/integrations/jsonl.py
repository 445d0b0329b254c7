"""JSON lines: one object a step, readable by anything."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, TextIO

from ..record import Rows
from .scalars import scalars_of

__all__ = ["JsonLinesSink"]


class JsonLinesSink:
    """Append ``{"step": 12, "time": …, "loss": …, "norm/all": …}`` a step to a file; a sink of `Recorder`.

    Args:
        place: the file; opened to append, so that nothing is lost.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self._file: TextIO = open(place, "a", encoding="utf8")  # noqa: SIM115 - closed by close()

    def write(self, batch: Sequence[Rows]) -> None:
        """Take the rows of one flush."""
        for rows in batch:
            for step, when, values in scalars_of(rows):
                line = {"step": step, "time": round(when, 3), "optimizer": rows.stream.index, **values}
                self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self, **meta: Any) -> None:
        """Close the file."""
        self._file.close()
