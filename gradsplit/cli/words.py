"""Words of the command line into values: lists separated by commas, and options of a workload."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["names", "numbers", "options"]


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas.

    >>> names("none, clip")
    ('none', 'clip')
    """
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas, each once.

    Raises:
        ValueError: a word that is no number; names the option.

    >>> numbers("1e-3,3e-3", "--lr")
    (0.001, 0.003)
    """
    try:
        return tuple(dict.fromkeys(float(word) for word in names(text)))
    except ValueError:
        raise ValueError(f"{option} {text}: expected numbers separated by commas, for example 1e-3,3e-3.") from None


def options(pairs: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Options of a workload from words key=value.

    Raises:
        ValueError: a word without "=".

    >>> options(["healthy=true", "gain=0.5", "batch=8"])
    {'healthy': True, 'gain': 0.5, 'batch': 8}
    """
    made = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--option {pair}: expected key=value, for example --option batch=8.")
        made[key.strip().replace("-", "_")] = _value(value.strip())
    return made


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
