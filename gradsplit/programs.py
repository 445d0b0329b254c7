"""The decision of a step in a few launches: budgets as text, the kernel's programs of them, and the definition beside.

A budget is a pure function through a namespace. Called with names in the place of arrays, and with this module as the
namespace, it computes nothing: each operation writes one statement of a Triton program, and the numbers that it met are
collected, to be read from memory in full precision. What cannot be said elementwise, such as a sort, raises, and such
budgets are worked out by torch.

The definition checks the programs once, and works out the decision as a whole when somebody looks at it.

>>> script = Script()
>>> limit = maximum(script.name("weight_norm"), full(1, 0.5, script.name("weight_norm"))) * 2.0
>>> print(script.text, script.numbers)
a0 = tl.maximum(weight_norm, n0)
a1 = a0 * n1
 [0.5, 2.0]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .budget import Decision, Ledger, Reading, StagedLedger, State, Term, decide
from .collective import Recent
from .kernels import Formula, FormulaPart, Kernel
from .kernels.selfcheck import is_sound

__all__ = [
    "Name",
    "Programs",
    "Script",
    "Step",
    "Unwritten",
    "asarray",
    "cast",
    "exp",
    "formula_of",
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

_HERE: Any = sys.modules[__name__]


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


def formula_of(terms: tuple[Term, ...], rule: str) -> Formula | None:
    """Return the terms as text; None where one bounds other nodes, sorts, or has one constant per node.

    Args:
        terms: from `terms_of`.
        rule: how limits become scales; "bottom_up" alone can be said.

    >>> from gradsplit.budget import Fixed, terms_of
    >>> from gradsplit.plan import Layout, xsp
    >>> import numpy as np
    >>> plan = xsp(Layout.from_shapes({"w": (2, 2)}))
    >>> made = formula_of(terms_of(plan, [("bin", Fixed(0.5))], np.ones(1), rule="bottom_up", call="f"), "bottom_up")
    >>> print(made.bins.limits, made.numbers)
    limit = tl.minimum(limit, n1)
     (inf, 0.5)
    """
    if rule != "bottom_up" or any(term.level not in ("bin", "root") for term in terms):
        return None
    numbers = [float("inf")]
    try:
        parts = [_part([term for term in terms if term.level == level], numbers) for level in ("bin", "root")]
    except (Unwritten, AttributeError, TypeError, ValueError):  # a function that the namespace does not have
        return None
    root = next((term for term in terms if term.level == "root"), None)
    return Formula(
        bins=parts[0],
        root=parts[1],
        numbers=tuple(numbers),
        numel=1.0 if root is None else float(root.numel[0]),
        num_rows=0.0 if root is None else float(root.num_rows[0]),
        reads_weights=any(term.budget.reads_weights for term in terms),
    )


def _part(terms: list[Term], numbers: list[float]) -> FormulaPart:
    learn = Script(numbers, "c")
    text, states = "", list[str]()
    for term in terms:
        budget, num = term.budget, len(states)
        one = Script(numbers, "b")
        history = _named(one, term, num)
        limit = one.name(str(budget.limits(_HERE, _reading(one), history)))
        if budget.bounds_update:
            limit = limit / one.name("reach")
        text += f"{one.text}limit = tl.minimum(limit, {limit})\n"
        fresh = budget.learn(_HERE, _reading(learn), learn.name("kept"), _named(learn, term, num)) if history else ()
        states += [str(name) for name in fresh]
    return FormulaPart(text, learn.text, tuple(states), bool(terms))


def _named(script: Script, term: Term, first: int) -> State:
    """The names of a term's history."""
    scratch = Script()
    num = len(term.budget.init(_HERE, scratch.name("norm")))
    return tuple(script.name(f"s{first + i}") for i in range(num))


def _reading(script: Script) -> Reading:
    return Reading(*(script.name(name) for name in ("norm", "weight_norm", "numel", "num_rows", "pace")))


Memory = tuple[tuple[State, ...], tuple[Tensor, Tensor] | None]
"""The history of a ledger; recent norms and number of steps of the collective rule, if it is in force."""

Given = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""What a decision starts from, (B,) each: squares of the gradient and of the weights, pace and reach."""

ROUNDING = 1e-9
"""What the programs and the definition may differ by; their sums over the bins are added in another order."""


class Step:
    """One step that programs decided.

    Attributes:
        scale_B: (B,) factors in [0, 1].
        zero_B: (B,) bool, the bins that are not finite.
    """

    def __init__(self, programs: Programs, given: Given, before: Memory, decided: Any) -> None:
        self.scale_B: Tensor = decided.scale_B
        self.zero_B: Tensor = decided.zero_B
        self._programs, self._given, self._before, self._decided = programs, given, before, decided

    def remember(self) -> None:
        """Enter the step into the histories; until then nothing is changed."""
        programs, decided = self._programs, self._decided
        programs.ledger.history = programs.nested(self._before[0], decided.history)
        if programs.recent is not None:
            programs.recent.recent_B, programs.recent.steps = decided.recent

    def worked_out(self) -> Decision:
        """Return the decision by the definition, from what was known before the step."""
        with torch.no_grad():
            history, recent = self._before
            return self._programs.worked_out(*self._given, history, recent)[0]


class Programs:
    """A ledger's budgets, and the collective rule, as programs of a kernel.

    Args:
        ledger: budgets of the bins and of the root.
        recent: the recent norms of the collective rule, or None.
        decider: the kernel's programs, see `Kernel.decider`.
    """

    def __init__(self, ledger: Ledger, recent: Recent | None, decider: Any) -> None:
        self.ledger, self.recent, self.decider = ledger, recent, decider
        # In a program the vectors of the bins' budgets come first.
        self._order = sorted(range(len(ledger.terms)), key=lambda i: ledger.terms[i].level == "root")

    @classmethod
    def of(cls, kernel: Kernel, ledger: Ledger | StagedLedger, recent: Recent | None, like: Tensor) -> Programs | None:
        """Return the programs, after they have shown that they decide as the definition does; None: torch decides.

        Args:
            kernel: reads and scales the bins.
            ledger: see the class.
            recent: see the class.
            like: (B,) a vector of the dtype and on the device in which norms are measured.

        Raises:
            SelfCheckError: the kernel was asked for by name, and a program is wrong on this device.
        """
        if not kernel.decides or not isinstance(ledger, Ledger):
            return None
        formula = formula_of(ledger.terms, ledger.rule)
        decider = None if formula is None else kernel.decider(formula, collective=recent is not None)
        if decider is None:
            return None
        made = cls(ledger, recent, decider)
        name, trial = f"triton: decision {decider.key}", partial(made.trial, like)
        sound = is_sound(name, like.device, like.dtype, trial, by_name=kernel.by_name, rounding=ROUNDING)
        return made if sound else None

    def decide(
        self, squares_B: Tensor, weight_squares_B: Tensor | None, pace_B: Tensor | None, reach_B: Tensor | None
    ) -> Step:
        """Decide one step; arguments as of `Ledger.decide`."""
        before = self.remembered()
        given = squares_B, weight_squares_B, pace_B, reach_B
        return Step(self, given, before, self.decider.decide(*given, self.flat(before[0]), before[1]))

    def remembered(self) -> Memory:
        """Return what the next step depends on."""
        return self.ledger.history, None if self.recent is None else (self.recent.recent_B, self.recent.steps)

    def worked_out(
        self,
        squares_B: Tensor,
        weight_squares_B: Tensor | None,
        pace_B: Tensor | None,
        reach_B: Tensor | None,
        history: tuple[State, ...],
        recent: tuple[Tensor, Tensor] | None,
    ) -> tuple[Decision, tuple[State, ...], tuple[Tensor, Tensor] | None]:
        """Return the decision by the definition, and what is remembered after it; nothing is kept."""
        ledger, factor = self.ledger, torch.ones_like(squares_B[0])
        if recent is not None and self.recent is not None:
            factor, recent_B, steps = self.recent.after(squares_B, *recent)
            recent = recent_B, steps
        weights_B = weight_squares_B if ledger.reads_weights else None
        given = squares_B * factor.square(), weights_B, pace_B, reach_B
        made, history = decide(ledger.plan, ledger.terms, history, *given, rule=ledger.rule)
        decision = Decision(made.plan, made.norm_B / factor, made.finite_B, made.scale_B * factor, made.limits)
        return decision, history, recent

    def trial(self, like: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Decide steps with a spike, zeros and values that are not finite, by the programs and by the definition."""
        b = torch.arange(len(like), dtype=like.dtype, device=like.device)
        history, recent = self.remembered()
        for step in range(8):
            if step == 5:  # long after the warm-up: any numbers >= 0 are a history
                flat = self.flat(history)
                flat = [30.0 * torch.sin(b[: len(v)] * (i + 1.7) + 1.0).abs() for i, v in enumerate(flat)]
                history = self.nested(history, flat)
            size = torch.sin(b * 7.1 + step) ** 2 * (1e4 if step == 3 else 1.0)
            squares_B = torch.where(b % 11 == step, 0.0, torch.where(b % 13 == step + 3, torch.nan, size))
            squares_B[-1] = torch.inf if step == 2 else 1e6 if step == 4 else squares_B[-1]
            given = squares_B, torch.cos(b * 3.3) ** 2, 1.0 / (1.0 + b % 3), 0.1 + b % 2
            decided = self.decider.decide(*given, self.flat(history), recent)
            decision, history, recent = self.worked_out(*given, history, recent)
            yield f"a scale of step {step}", decided.scale_B, decision.scale_B
            yield f"a zero of step {step}", decided.zero_B, ~decision.finite_B
            for found, wanted in zip(decided.history, self.flat(history), strict=True):
                yield f"the history after step {step}", found, wanted
            for found, wanted in zip(decided.recent or (), recent or (), strict=True):
                yield f"what the collective rule remembers after step {step}", found, wanted

    def flat(self, history: tuple[State, ...]) -> list[Tensor]:
        """Return a history as the programs take it."""
        return [vector for i in self._order for vector in history[i]]

    def nested(self, history: tuple[State, ...], flat: list[Tensor]) -> tuple[State, ...]:
        """Return what the programs made as a history, term by term as the given one."""
        fresh, vectors = list(history), iter(flat)
        for i in self._order:
            fresh[i] = tuple(next(vectors) for _ in history[i])
        return tuple(fresh)
