"""How a watched process ends: the recording is closed, what was recorded is said, and a check may fail the process.

Nothing here imports torch. A process that never imports it does not wait for it, and is told so only if it asked for a
check.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import Any

from .settings import Settings

__all__ = ["Ending", "say"]

FAILED = 3
"""Exit code of a script whose own end was fine, but whose check was not passed."""


def say(text: str) -> None:
    """Write one line on standard error; do nothing where the script has closed it."""
    stream = sys.stderr
    if stream is not None:
        with contextlib.suppress(Exception):
            print(f"gradsplit: {text}", file=stream, flush=True)


class Ending:
    """The end of one process of the script, however it comes.

    ``os._exit`` and ``os.exec…`` skip everything that Python does at exit. They are wrapped, so that what was recorded
    until then is written first; both do what they did.

    Args:
        settings: what was asked for.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.session: Any = None
        self._exit, self._told = os._exit, False

    def install(self) -> None:
        """Register what happens at the end, for good."""
        atexit.register(self._at_exit)  # the first to be registered is the last to run

        @functools.wraps(self._exit)
        def exit_at_once(status: int) -> Any:
            failed = self._finish() and status == 0
            self._exit(FAILED if failed else status)

        os._exit = exit_at_once
        for name in ("execv", "execve"):
            setattr(os, name, self._flushed_before(getattr(os, name)))

    def _flushed_before(self, replace: Any) -> Any:
        @functools.wraps(replace)
        def replace_process(*args: Any, **kwargs: Any) -> Any:
            with contextlib.suppress(Exception):
                if self.session is not None:
                    self.session.flush()
            return replace(*args, **kwargs)

        return replace_process

    def _at_exit(self) -> None:
        if self._finish() and getattr(sys, "last_type", None) is None:  # an exception's own code is one already
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            self._exit(FAILED)

    def _finish(self) -> bool:
        """Close the recording and say what is in it; return whether a check that was asked for has failed."""
        try:
            if self.session is not None:
                self.session.close()
            if self._told or os.getpid() != self.settings.pid:
                return False
            self._told = True
            return self._tell()
        except Exception as error:
            say(f"the end of the recording failed ({error!r}). Please report it with the script.")
            return bool(self.settings.fail_on)

    def _tell(self) -> bool:
        asked = bool(self.settings.fail_on) or self.settings.guard
        place = Path(self.settings.record)
        if self.session is not None and self.session.place is not None:
            place = self.session.place
        reason = self._why_nothing()
        files = [
            path
            for path in (place, *sorted(place.parent.glob(f"{place.stem}.*{place.suffix}")))
            if os.path.exists(path)
        ]
        if not files or (self.session is not None and self.session.nothing):
            if reason and (asked or not self.settings.quiet):
                say(reason)
            elif asked:
                why = "" if "torch" in sys.modules else "torch was never imported, so that "
                say(f"{why}nothing was recorded, and the check fails")
            return asked
        if self.session is not None and self.session.failed and not self.session.num_rows:
            if asked or not self.settings.quiet:
                say(f"nothing was recorded: {self.session.failed}")
            return asked
        if not self.settings.quiet:
            if self.session is not None and self.session.num_actions:
                say(f"the guard acted {self.session.num_actions} times; the report says why")
            shown = _short(files[0])
            missing = "" if self.session is None else self.session.missing()
            said = f"recorded in part: {missing}; next:" if missing else "recorded; next:"
            say(f"{said} gradsplit report {shown}")
        return self._fails(files) if self.settings.fail_on else False

    def _why_nothing(self) -> str:
        """Say why nothing was recorded, where torch was there."""
        if "torch" not in sys.modules:
            return ""
        if self.session is None:
            return (
                "torch was loaded but nothing was attached, so that nothing was recorded. Something in this program "
                "loads torch in its own way; put a gradsplit.watch.record.Recorder into the script instead."
            )
        if self.session.failed or self.session.nothing:
            return ""  # it was said when it failed
        if self.session.num_rows:
            return f"the run file {self.session.place} is gone: the script, or somebody else, has removed it"
        return (
            "no step of a torch.optim.Optimizer was seen; nothing was recorded. Needed is an optimizer of torch, or an "
            "update by hand after loss.backward(); gradients from torch.autograd.grad are not seen."
        )

    def _fails(self, files: list[Path]) -> bool:
        from ..record import RunFile, RunFileError
        from ..report.account import FAILURES, account_of, fails_on

        failed: list[str] = []
        for path in files:
            try:
                with RunFile(path) as file:
                    account = account_of(file)
            except RunFileError as error:
                say(str(error))
                return True
            failed += [word for word in self.settings.fail_on if fails_on(word, account)]
        for word in dict.fromkeys(failed):
            say(f"failed on {word} ({FAILURES[word]})")
        return bool(failed)


def _short(place: Path) -> str:
    """The path as a user would write it here; the working folder may be gone."""
    try:
        shown = os.path.relpath(place)
    except (OSError, ValueError):
        return str(place)
    return str(place) if ".." in shown else shown
