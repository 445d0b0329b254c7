"""The array namespace that writes text: a function of arrays becomes statements of a Triton program.

A budget is a pure function through a namespace. Called with the names of this one it computes nothing; each operation
writes one statement, and the numbers that it met are collected, to be read from memory in full precision. What cannot
be said elementwise, such as a sort, raises, and its budget is worked out by torch.

>>> script = Script()
>>> limit = maximum(script.name("weight_norm"), full(1, 0.5, script.name("weight_norm"))) * 2.0
>>> print(script.text, script.numbers)
a0 = tl.maximum(weight_norm, n0)
a1 = a0 * n1
 [0.5, 2.0]
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "Name",
    "Script",
    "Unwritten",
    "asarray",
    "cast",
    "exp",
    "full",
    "isfinite",
    "log",
    "logical_or",
    "maximum",
    "minimum",
    "sqrt",
    "where",
    "zeros_like",
]


class Unwritten(TypeError):
    """Something that an elementwise program cannot say."""


class Script:
    """The statements that were written so far, and the numbers in them.

    Args:
        numbers: a list to which numbers are added, so that several scripts can share it.
        prefix: with what the names of results begin.
    """

    def __init__(self, numbers: list[float] | None = None, prefix: str = "a") -> None:
        self.numbers: list[float] = [] if numbers is None else numbers
        self.prefix = prefix
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        """The statements, one a line."""
        return "".join(f"{line}\n" for line in self._lines)

    def name(self, text: str) -> Name:
        """Return the name of something that the program knows already."""
        return Name(self, text)

    def number(self, value: Any) -> Name:
        """Return a number's name."""
        number = float(value)
        if number not in self.numbers:
            self.numbers.append(number)
        return Name(self, f"n{self.numbers.index(number)}")

    def write(self, expression: str) -> Name:
        """Write a statement and return the name of its result."""
        made = Name(self, f"{self.prefix}{len(self._lines)}")
        self._lines.append(f"{made} = {expression}")
        return made


class Name:
    """A vector that a program will hold, one entry per node; operators write statements."""

    shape = (1,)

    def __init__(self, script: Script, text: str) -> None:
        self.script, self._text = script, text

    def __str__(self) -> str:
        return self._text

    def __bool__(self) -> bool:
        raise Unwritten("a program cannot branch on a value")

    def of(self, value: Any) -> Name:
        """Return another operand as a name."""
        return value if isinstance(value, Name) else self.script.number(value)

    def _write(self, sign: str, other: Any, *, turned: bool = False) -> Name:
        left, right = (self.of(other), self) if turned else (self, self.of(other))
        return self.script.write(f"{left} {sign} {right}")

    def __add__(self, other: Any) -> Name:
        return self._write("+", other)

    def __radd__(self, other: Any) -> Name:
        return self._write("+", other, turned=True)

    def __sub__(self, other: Any) -> Name:
        return self._write("-", other)

    def __rsub__(self, other: Any) -> Name:
        return self._write("-", other, turned=True)

    def __mul__(self, other: Any) -> Name:
        return self._write("*", other)

    def __rmul__(self, other: Any) -> Name:
        return self._write("*", other, turned=True)

    def __truediv__(self, other: Any) -> Name:
        return self._write("/", other)

    def __rtruediv__(self, other: Any) -> Name:
        return self._write("/", other, turned=True)

    def __pow__(self, power: Any) -> Name:
        if power != 2:
            raise Unwritten(f"a program cannot raise to {power!r}")
        return self._write("*", self)

    def __neg__(self) -> Name:
        return self._write("-", 0.0, turned=True)

    def __lt__(self, other: Any) -> Name:
        return self._write("<", other)

    def __le__(self, other: Any) -> Name:
        return self._write("<=", other)

    def __gt__(self, other: Any) -> Name:
        return self._write(">", other)

    def __ge__(self, other: Any) -> Name:
        return self._write(">=", other)

    def __and__(self, other: Any) -> Name:
        return self._write("&", other)

    def __or__(self, other: Any) -> Name:
        return self._write("|", other)


def _call(function: str, *values: Any) -> Name:
    names = [value for value in values if isinstance(value, Name)]
    if not names:
        raise Unwritten(f"{function} of numbers alone")
    return names[0].script.write(f"tl.{function}({', '.join(str(names[0].of(value)) for value in values)})")


def where(condition: Any, a: Any, b: Any) -> Name:
    """Choose elementwise."""
    return _call("where", condition, a, b)


def maximum(a: Any, b: Any) -> Name:
    """The larger of two."""
    return _call("maximum", a, b)


def minimum(a: Any, b: Any) -> Name:
    """The smaller of two."""
    return _call("minimum", a, b)


def sqrt(a: Name) -> Name:
    """The square root."""
    return _call("sqrt", a)


def exp(a: Name) -> Name:
    """The exponential."""
    return _call("exp", a)


def log(a: Name) -> Name:
    """The natural logarithm."""
    return _call("log", a)


def isfinite(a: Name) -> Name:
    """Whether entries are finite; a nan is below nothing."""
    return _call("abs", a) < float("inf")


def logical_or(a: Name, b: Any) -> Name:
    """Whether one of two holds."""
    return a | b


def full(num: int, value: float, like: Name) -> Name:
    """Return a vector of one value."""
    return like.script.number(value)


def asarray(values: Any, like: Name) -> Name:
    """Return a number; several numbers cannot be said."""
    if isinstance(values, Name):
        return values
    try:
        return like.script.number(values)
    except TypeError:
        raise Unwritten("a program cannot hold one number per node") from None


def cast(array: Name, like: Any) -> Name:
    """Return the vector as it is: a program computes in one precision."""
    return array


def zeros_like(array: Name) -> Name:
    """Return zeros."""
    return array.script.number(0.0)
