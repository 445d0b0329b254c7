"""The decision of a step in a few launches: budgets as text, the kernel's programs of them, and the definition beside.

Limits, scales and histories come from programs, see `gradsplit.kernels.triton_decide`. The definition checks them once,
and works out the decision as a whole when somebody looks at it: `Ledger` computes the same from the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .budget import Decision, Ledger, StagedLedger, State, decide
from .budget.formulas import formula_of
from .collective import Recent
from .kernels import Kernel
from .kernels.selfcheck import is_sound

__all__ = ["Programs", "Step"]

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
