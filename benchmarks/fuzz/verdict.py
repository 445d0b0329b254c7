"""What may come out of a call with bad input: an answer, or an error that the package itself raised and worded."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradsplit

__all__ = ["NotOurs", "is_ours", "outcome"]

_PACKAGE = Path(gradsplit.__file__).resolve().parent
_KINDS = (ValueError, TypeError, RuntimeError, FloatingPointError)  # RunFileError and the like are RuntimeErrors


class NotOurs(AssertionError):
    """Something else than an answer or an error of ours came out."""


def is_ours(error: BaseException) -> bool:
    """Whether the package raised this error on purpose: of our kinds, in our code, saying what was expected."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(_PACKAGE)
    return isinstance(error, _KINDS) and raised_here and bool(re.search(r"\bexpected\b", str(error)))


def outcome(call: Callable[[], Any], *, what: str) -> tuple[str, Any]:
    """("ok", answer) or ("refused", error).

    Args:
        call: the call under test.
        what: the input, for the message.

    Raises:
        NotOurs: any other exception.
    """
    try:
        return "ok", call()
    except Exception as error:
        if not is_ours(error):
            raise NotOurs(f"{type(error).__name__}: {error} after {what[:2000]}") from error
        return "refused", error
