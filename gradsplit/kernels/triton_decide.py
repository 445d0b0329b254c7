"""Limits, scales and history of all bins in one to four launches, by Triton programs written from budgets as text.

One program takes a block of bins through everything, where budgets bound bins alone. With a budget at the root a first
program bounds the bins and adds up what they keep, a second one bounds the root, and a third one enters what both let
through into the histories of the bins. The collective rule comes before, as one more launch and torch's median.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..collective import COLLECTIVE, ENOUGH, FALLS, LET_THROUGH, RISES
from .kernel import Formula
from .launch import launch

__all__ = ["BINS", "Decided", "Decider"]

BINS = 512
"""Bins of one program."""

SUMS = 5
"""What is added up over the bins for the root: squares before, of the weights, after; pace and reach by elements."""


class Decided(NamedTuple):
    """What a step decided, on the device.

    Attributes:
        scale_B: (B,) factors in [0, 1].
        zero_B: (B,) bool, the bins that are not finite.
        history: the next state vectors, of the bins' budgets and then of the root's.
        recent: the next recent norms (B,) and number of steps of the collective rule, or None.
    """

    scale_B: Tensor
    zero_B: Tensor
    history: list[Tensor]
    recent: tuple[Tensor, Tensor] | None


_READ = """\
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = b < num_bins
    infinite = tl.load(numbers)
    square = tl.load(squares + b, mask=there, other=0.0)
    finite = square < infinite
    norm = tl.sqrt(tl.where(finite, square, 0.0))
"""

_READ_MORE = """\
    weight2 = tl.load(weights + b, mask=there, other=0.0)
    weight2 = tl.where(weight2 < infinite, weight2, 0.0)
    weight_norm = tl.sqrt(weight2)
    numel = tl.load(numels + b, mask=there, other=0.0)
    num_rows = tl.load(rows + b, mask=there, other=0.0)
    pace = tl.load(paces + b * pace_step, mask=there, other=0.0)
    reach = tl.load(reaches + b * reach_step, mask=there, other=0.0)
"""

_RATIO = """\
    recent = tl.load(recents + b, mask=there, other=0.0)
    known = finite & (norm > 0.0) & (recent > 0.0)
    ratio = tl.where(known, norm / tl.where(known, recent, 1.0), infinite - infinite)
    tl.store(ratios + b, ratio, mask=there)
    seen = tl.where(there & finite & (norm > 0.0), 1.0, 0.0)
    tl.store(flags + 2 * tl.program_id(0), tl.sum(seen.to(tl.float64), axis=0))
    tl.store(flags + 2 * tl.program_id(0) + 1, tl.sum(tl.where(there & known, 1.0, 0.0).to(tl.float64), axis=0))
"""

_FACTOR = """\
    num_seen, num_known = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for lo in range(0, num_blocks, BLOCK):
        i = lo + tl.arange(0, BLOCK)
        num_seen += tl.load(flags + 2 * i, mask=i < num_blocks, other=0.0)
        num_known += tl.load(flags + 2 * i + 1, mask=i < num_blocks, other=0.0)
    median = tl.load(medians)
    fired = (median > tl.load(rules)) & (tl.sum(num_known, axis=0) >= tl.load(rules + 4))
    factor = tl.where(fired, 1.0 / median, 1.0)
"""

_COLLECTIVE = """\
    steps, recent = tl.load(counts), tl.load(recents + b, mask=there, other=0.0)
    falls = tl.minimum(steps / (steps + 2.0), tl.load(rules + 2))
    follows = tl.minimum(tl.maximum(norm, falls * recent), tl.load(rules + 3) * recent)
    moved = tl.where(recent > 0.0, tl.where(fired, tl.load(rules + 1) * recent, follows), norm * factor)
    tl.store(new_recents + b, tl.where(finite & (norm > 0.0), moved, recent), mask=there)
    if tl.program_id(0) == 0:
        tl.store(new_counts, steps + tl.where(tl.sum(num_seen, axis=0) > 0.0, 1.0, 0.0))
"""

_BOUND = """\
    over = norm > limit
    scale = tl.where(over, limit / tl.where(over, norm, 1.0), 1.0)
    scale = tl.where(finite, scale, 0.0)
"""

_ADD = """\
    at = partial + tl.program_id(0) * 5
    kept2 = norm * scale * (norm * scale)
    tl.store(at, tl.sum(norm * norm, axis=0))
    tl.store(at + 1, tl.sum(weight2, axis=0))
    tl.store(at + 2, tl.sum(tl.where(there, kept2, 0.0), axis=0))
    tl.store(at + 3, tl.sum(pace * numel, axis=0))
    tl.store(at + 4, tl.sum(reach * numel, axis=0))
    tl.store(scales + b, scale, mask=there)
"""

_ROOT = """\
    sum0, sum1 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    sum2, sum3 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    sum4 = tl.zeros([BLOCK], tl.float64)
    for lo in range(0, num_blocks, BLOCK):
        i = lo + tl.arange(0, BLOCK)
        row, there = partial + i * 5, i < num_blocks
        sum0 += tl.load(row, mask=there, other=0.0)
        sum1 += tl.load(row + 1, mask=there, other=0.0)
        sum2 += tl.load(row + 2, mask=there, other=0.0)
        sum3 += tl.load(row + 3, mask=there, other=0.0)
        sum4 += tl.load(row + 4, mask=there, other=0.0)
    infinite = tl.load(numbers)
    norm, weight_norm = tl.sqrt(tl.sum(sum0, axis=0)), tl.sqrt(tl.sum(sum1, axis=0))
    held = tl.sqrt(tl.sum(sum2, axis=0))
    numel, num_rows = tl.load(sizes), tl.load(sizes + 1)
    pace, reach = tl.sum(sum3, axis=0) / numel, tl.sum(sum4, axis=0) / numel
    limit = infinite
"""

_BOUND_ROOT = """\
    over = held > limit
    below = tl.where(over, limit / tl.where(over, held, 1.0), 1.0)
    tl.store(partial + 5 * num_blocks, below)
    kept = held * below
"""

_SETTLE = """\
    scale = tl.load(scales + b, mask=there, other=0.0) * tl.load(partial + 5 * num_blocks)
    scale = tl.where(finite, scale, 0.0)
"""


class Decider:
    """The programs for a formula over B bins.

    Args:
        formula: the budgets.
        numel_B, num_rows_B: (B,) sizes of the bins, on the device, in float64.
        collective: with the rule of `gradsplit.collective`.
    """

    def __init__(self, formula: Formula, numel_B: Tensor, num_rows_B: Tensor, *, collective: bool) -> None:
        self.formula, self.collective, self.device = formula, collective, numel_B.device
        self.num_bins, self.num_blocks = len(numel_B), -(-len(numel_B) // BINS)
        self._sizes_B = numel_B, num_rows_B
        self._numbers, self._rules, self._sizes, self._one = (
            torch.tensor(values, dtype=torch.float64, device=self.device)
            for values in (
                formula.numbers,
                (COLLECTIVE, LET_THROUGH, FALLS, RISES, ENOUGH),
                (formula.numel, formula.num_rows),
                (1.0,),
            )
        )
        self.texts = _texts(formula, collective)

    @property
    def key(self) -> str:
        """What the programs compute, as sixteen hexadecimal digits; equal texts are one program."""
        return hashlib.sha256(repr((self.texts, self.formula.numbers)).encode()).hexdigest()[:16]

    def decide(
        self,
        squares_B: Tensor,
        weights_B: Tensor | None,
        pace_B: Tensor | None,
        reach_B: Tensor | None,
        history: Sequence[Tensor],
        recent: tuple[Tensor, Tensor] | None,
    ) -> Decided:
        """Return what a step decides; nothing is changed in place.

        Args:
            squares_B: (B,) float64, squares of the gradient; not finite where an entry was not.
            weights_B: (B,) squares of the weights, where a limit reads them.
            pace_B: (B,) see `Ledger.decide`; None: 1.
            reach_B: (B,) see `Ledger.decide`; None: 1.
            history: the state vectors, of the bins' budgets and then of the root's.
            recent: recent norms and number of steps, with the collective rule.
        """
        num = len(self.formula.bins.states)
        of_bins, of_root = list(history[:num]), list(history[num:])
        new, new_root, partial, scale_B = (
            torch.empty(shape, dtype=torch.float64, device=self.device)
            for shape in ((num, self.num_bins), (len(of_root), 1), (SUMS * self.num_blocks + 1,), (self.num_bins,))
        )
        zero_B = torch.empty(self.num_bins, dtype=torch.bool, device=self.device)
        pace, reach = (self._one if rate is None else rate for rate in (pace_B, reach_B))
        given: dict[str, Any] = {
            "squares": squares_B,
            "weights": squares_B if weights_B is None else weights_B,
            "numels": self._sizes_B[0],
            "rows": self._sizes_B[1],
            "paces": pace,
            "pace_step": pace.stride(0) if pace_B is not None else 0,
            "reaches": reach,
            "reach_step": reach.stride(0) if reach_B is not None else 0,
            "numbers": self._numbers,
            "sizes": self._sizes,
            "partial": partial,
            "scales": scale_B,
            "zeros": zero_B.view(torch.uint8),
            "fresh": new,
            "fresh_root": new_root,
            "num_bins": self.num_bins,
            "num_blocks": self.num_blocks,
            **{f"state{i}": state for i, state in enumerate(of_bins)},
            **{f"root{i}": state for i, state in enumerate(of_root)},
        }
        fresh_recent = None
        if recent is not None:
            fresh_recent = torch.empty_like(recent[0]), torch.empty_like(recent[1])
            ratios, flags = (
                torch.empty(n, dtype=torch.float64, device=self.device) for n in (self.num_bins, 2 * self.num_blocks)
            )
            given |= {"recents": recent[0], "counts": recent[1], "ratios": ratios, "flags": flags, "rules": self._rules}
            given |= {"new_recents": fresh_recent[0], "new_counts": fresh_recent[1]}
            self._run("ratio", given)
            given["medians"] = torch.nanmedian(ratios)
        for name in ("bound", "root", "settle") if self.formula.root.bounds else ("bound",):
            self._run(name, given)
        return Decided(scale_B, zero_B, [*new.unbind(), *new_root.unbind()], fresh_recent)

    def _run(self, name: str, given: dict[str, Any]) -> None:
        program, parameters = _program(name, self.texts[name])
        grid = (1,) if name == "root" else (self.num_blocks,)
        launch(self.device, program, grid, *(given[key] for key in parameters), BINS)


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _texts(formula: Formula, collective: bool) -> dict[str, str]:
    """The body of each program."""
    numbers = "".join(f"    n{i} = tl.load(numbers + {i})\n" for i in range(len(formula.numbers)))
    bins, root = formula.bins, formula.root
    states, of_root = (
        "".join(f"    s{i} = tl.load({place})\n" for i, place in enumerate(places))
        for places in (
            [f"state{i} + b, mask=there, other=0.0" for i in range(len(bins.states))],
            [f"root{i}" for i in range(len(root.states))],
        )
    )
    factor = _FACTOR + "    norm = norm * factor\n" if collective else ""
    took_part = _FACTOR + _COLLECTIVE + "    norm = norm * factor\n" if collective else ""
    learn = "    kept = norm * scale\n" + _indented(bins.learn) + _stores(bins.states, "fresh", "num_bins")
    finish = "    scale = scale * factor\n" if collective else ""
    finish += "    tl.store(scales + b, scale, mask=there)\n"
    finish += "    tl.store(zeros + b, tl.where(finite, 0, 1).to(tl.uint8), mask=there)\n"
    limits = numbers + states + "    limit = tl.zeros([BLOCK], tl.float64) + infinite\n" + _indented(bins.limits)
    texts = {"bound": _READ + took_part + _READ_MORE + limits + _BOUND}
    texts["bound"] += _ADD if root.bounds else learn + finish
    if collective:
        texts["ratio"] = _READ + _RATIO
    if root.bounds:
        stores = "".join(f"    tl.store(fresh_root + {i}, {name})\n" for i, name in enumerate(root.states))
        texts["root"] = (
            _ROOT + numbers + of_root + _indented(root.limits) + _BOUND_ROOT + _indented(root.learn) + stores
        )
        texts["settle"] = _READ + factor + _READ_MORE + numbers + states + _SETTLE + learn + finish
    return texts


def _stores(names: Sequence[str], where: str, step: str) -> str:
    return "".join(f"    tl.store({where} + {i} * {step} + b, {name}, mask=there)\n" for i, name in enumerate(names))


_POINTERS = (
    *("squares", "weights", "numels", "rows", "paces", "pace_step", "reaches", "reach_step", "numbers", "sizes"),
    *("partial", "scales", "zeros", "fresh", "fresh_root", "recents", "counts", "ratios", "flags", "rules"),
    *("new_recents", "new_counts", "medians", "num_bins", "num_blocks"),
)


_HARMLESS = (
    *(
        ast.Module,
        ast.FunctionDef,
        ast.arguments,
        ast.arg,
        ast.Assign,
        ast.AugAssign,
        ast.Expr,
        ast.For,
        ast.If,
        ast.Name,
    ),
    *(ast.Attribute, ast.Call, ast.keyword, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp),
    *(ast.Tuple, ast.List, ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def only_arithmetic(tree: ast.Module) -> None:
    """Let a text through that computes with Triton's own operations and does nothing else.

    Raises:
        ValueError: a node of another kind, a name or attribute with a leading underscore, or a call of something that
            is no operation of ``tl``, no conversion ``.to(…)`` and no ``range``.
    """
    for node in ast.walk(tree):
        sound = isinstance(node, _HARMLESS)
        if isinstance(node, (ast.Name, ast.Attribute)):
            sound = not (node.id if isinstance(node, ast.Name) else node.attr).startswith("_")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            sound = called.startswith("tl.") or called == "range" or called.endswith(".to")
        if not sound:
            raise ValueError(
                f"a budget's program for Triton: expected arithmetic alone, got {ast.unparse(node)!r}. Use "
                "backend='eager'."
            )


@lru_cache(maxsize=64)
def _program(name: str, body: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Make a program of a text; return it with the names of its parameters.

    Triton reads a program's source by `inspect`, which finds a text that `linecache` knows.
    """
    words = set(re.findall(r"\w+", body))
    states = sorted(word for word in words if re.fullmatch(r"(state|root)\d+", word))
    parameters = (*(pointer for pointer in _POINTERS if pointer in words), *states)
    text = f"@triton.jit\ndef decide_{name}({', '.join(parameters)}, BLOCK: tl.constexpr):\n{body}"
    file = f"<gradsplit decides {name} {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"triton": triton, "tl": triton.language, "__name__": __name__}
    tree = ast.parse(text)
    only_arithmetic(tree)
    exec(compile(tree, file, "exec"), scope)
    return scope[f"decide_{name}"], parameters
