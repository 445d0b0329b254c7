"""What "the same numbers in every framework" runs over: strategies, budgets, levels and rules, weights and gradients.

Arrays are made in PyTorch's order, float32; `turned` gives them in the order of frameworks that keep output units last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import gradsplit as gs
from gradsplit.budget import budgets_by_level
from gradsplit.plan import STRATEGIES, Layout, Plan, lbf, tree_sp, xsp
from tests.laws.cases import BUDGETS, energies

# A dense kernel, a convolution's, vectors, a scalar; modules two deep. Nested as frameworks nest their parameters.
LAYOUT = Layout.from_shapes(
    {
        "stem.conv.weight": (4, 2, 3, 3),
        "stem.conv.bias": (4,),
        "body.fc1.weight": (6, 5),
        "body.fc1.bias": (6,),
        "body.fc2.weight": (3, 6),
        "scale": (),
    }
)
LAST = {"stem.conv.weight": (3, 3, 2, 4), "body.fc1.weight": (5, 6), "body.fc2.weight": (6, 3)}
"""The shapes of kernels where output units are last."""

NUM_STEPS = 50
LR, MOMENTUM = 0.05, 0.9


class Case(NamedTuple):
    """One combination: how the plan is made, what bounds it, the rule, and how far float32 scales may be off.

    With ``collective`` the collective rule stands beside the budget, and every tenth batch is a thousandfold.
    """

    strategy: str
    budget: Any
    rule: str = "bottom_up"
    tolerance: float = 1e-6
    collective: bool = False

    def plan(self) -> Plan:
        return PLANS[self.strategy](LAYOUT)

    def gradients(self, step: int) -> list[np.ndarray]:
        times = np.float32(1000 if self.collective and step % 10 == 8 else 1)
        return [gradient * times for gradient in gradients(step)]

    @property
    def bounds_update(self) -> bool:
        return any(one.bounds_update for _, one in budgets_by_level(self.budget, self.plan(), call="Case"))


def _of_strategy(name: str) -> Any:
    row = STRATEGIES[name]
    return (lambda layout: row.make(layout, energies(layout))) if row.needs_energy else row.make


PLANS = {name: _of_strategy(name) for name in STRATEGIES} | {
    "xsp, columns": lambda layout: xsp(layout, axis=1),
    "xsp, 2 parts": lambda layout: xsp(layout, parts=2),
    "lbf, few bins": lambda layout: lbf(layout, energies(layout), max_bins=20, min_gain=0.0),
    "tree_sp over rows": lambda layout: tree_sp(layout, inner="xsp"),
}

CASES: dict[str, Case] = {
    f"{strategy} / {budget}": Case(strategy, BUDGETS[budget]) for strategy in STRATEGIES for budget in BUDGETS
}
CASES |= {
    f"{strategy} / relative": Case(strategy, BUDGETS["relative"]) for strategy in sorted(set(PLANS) - set(STRATEGIES))
}
CASES |= {
    "xsp / relative, collective": Case("xsp", gs.Relative(0.2), collective=True),
    "xsp / ema, collective": Case("xsp", BUDGETS["ema"], collective=True),
    "tree_sp over rows / relative, collective": Case(
        "tree_sp over rows", {"root": gs.Relative(0.2), "bin": gs.Relative(0.2)}, collective=True
    ),
}
_EVERY_LEVEL = ("root", "module", "bin")
CASES |= {
    f"tree_sp over rows, every level / {name}": Case("tree_sp over rows", dict.fromkeys(_EVERY_LEVEL, BUDGETS[name]))
    for name in sorted(set(BUDGETS) - {"fixed"})
}
for _rule in ("bottom_up", "nearest"):
    CASES |= {
        f"xsp, root, tensor and bin / fixed / {_rule}": Case(
            "xsp", {"root": gs.Fixed(0.8), "tensor": gs.Fixed(0.45), "bin": gs.Fixed(0.5)}, _rule
        ),
        f"tree_sp over rows / every budget / {_rule}": Case(
            "tree_sp over rows",
            {
                "root": (BUDGETS["zscore"], BUDGETS["percentile"]),
                "module": BUDGETS["relative"],
                "tensor": BUDGETS["relative_step"],
                "bin": (BUDGETS["ema"], BUDGETS["fixed"]),
            },
            _rule,
            # Nearest: what a node's limit leaves beside its fixed bins is a small difference of two float32 lengths.
            1e-6 if _rule == "bottom_up" else 5e-6,
        ),
    }


def weights(seed: int = 1) -> list[np.ndarray]:
    """One array a layout entry, float32."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), dtype=np.float32) for shape in LAYOUT.shapes]


def gradients(step: int, seed: int = 2) -> list[np.ndarray]:
    """Gradients of one step: sizes differ from row to row and step to step; now and then one explodes or is broken."""
    rng = np.random.default_rng((seed, step))
    made = []
    for shape in LAYOUT.shapes:
        rows = np.exp(rng.standard_normal((shape[0],) + (1,) * (len(shape) - 1)) if shape else 0.0)
        made.append(np.asarray(rng.standard_normal(shape) * rows, dtype=np.float32))
    if step % 7 == 3:
        made[step % 4] *= np.float32(1e4)
    if step % 10 == 6:
        made[2][step % 6, 1] = (np.nan, np.inf)[step % 20 == 6]
    return made


def turned(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The same arrays with output units last."""
    return [np.moveaxis(np.moveaxis(a, 0, -1), 0, -2) if a.ndim > 1 else a for a in arrays]


def turned_back(arrays: list[Any]) -> list[np.ndarray]:
    """Arrays with output units last, in PyTorch's order."""
    arrays = [np.asarray(a) for a in arrays]
    return [np.moveaxis(np.moveaxis(a, -1, 0), -1, 1) if a.ndim > 1 else a for a in arrays]


def pace_at(step: int) -> float:
    """Learning rate / largest so far of a schedule that falls by 1 % a step."""
    return 0.99**step
