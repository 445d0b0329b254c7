"""The cells of a comparison: which runs a grid asks for, and one of them carried out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .methods import METHODS, method_named
from .optimizers import Settings
from .registry import workload
from .train import train

__all__ = ["FIRST_TUNING_SEED", "Cell", "Grid", "methods_of_strategies", "run_cell"]

FIRST_TUNING_SEED = 1000  # seeds that choose a cell are never the seeds that confirm it
CURVE_POINTS = 100  # of the loss, kept of every run


@dataclass(frozen=True, order=True)
class Cell:
    """One run of a grid.

    Attributes:
        seed: of weights and batches.
        method: a name of `METHODS`.
        strength: in the method's unit; None: nothing to tune.
        lr: learning rate.
    """

    seed: int
    method: str
    strength: float | None
    lr: float


@dataclass(frozen=True)
class Grid:
    """What a comparison asks for: every method at every learning rate and, where it is tuned, every strength.

    Attributes:
        workload: a name of the registry.
        methods: names of `METHODS`.
        lrs: learning rates, the same for every method; a method adds what its authors prescribe.
        settings: steps, optimizer, schedule, warm-up.
        seeds: number of seeds that choose.
        fresh_seeds: number of other seeds, on which only the best cell of each method is run; 0: none.
        strengths: in place of the methods' own grids, for those that are tuned; None: the grids.
        options: passed to the workload's build.
        usual_lrs: whether each method is also tried at the rate that its authors give.

    Raises:
        ValueError: an unknown workload or method, no learning rates, a rate that is not > 0.
    """

    workload: str
    methods: tuple[str, ...]
    lrs: tuple[float, ...]
    settings: Settings
    seeds: int = 3
    fresh_seeds: int = 0
    strengths: tuple[float, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    usual_lrs: bool = False

    def __post_init__(self) -> None:
        row = workload(self.workload)
        for name in self.methods:
            method_named(name)
        if not self.methods or not (self.lrs or self.usual_lrs) or not all(lr > 0 for lr in self.lrs):
            raise ValueError(
                f"Grid(methods={self.methods}, lrs={self.lrs}): expected at least one method and learning rates > 0."
            )
        without = [name for name in self.methods if not self.lrs_of(name)]
        if without:
            raise ValueError(
                f"Grid(lrs={self.lrs}, usual_lrs={self.usual_lrs}): expected a learning rate for every method, found "
                f"none for {', '.join(without)}. Name rates, for example --lr 0.03,0.1."
            )
        if self.seeds < 1 or self.fresh_seeds < 0:
            raise ValueError(f"Grid(seeds={self.seeds}, fresh_seeds={self.fresh_seeds}): expected >= 1 and >= 0.")
        unknown = sorted(set(self.options) - set(row.options))
        if unknown:
            raise ValueError(
                f"Grid(workload={self.workload!r}, options={sorted(self.options)}): expected options of "
                f"{', '.join(row.options) or 'none'}, got {', '.join(unknown)}."
            )

    def strengths_of(self, method: str) -> Sequence[float | None]:
        """The strengths that are tried with a method."""
        own = METHODS[method].strengths
        return (None,) if not own else own if self.strengths is None else self.strengths

    def lrs_of(self, method: str) -> tuple[float, ...]:
        """The learning rates that are tried with a method, ascending."""
        row = METHODS[method]
        usual = {row.usual_lr} - {None} if self.usual_lrs else set()
        return tuple(sorted(lr for lr in {*self.lrs, *row.own_lrs, *usual} if lr is not None and lr <= row.largest_lr))

    def cells(self) -> Iterator[Cell]:
        """The cells that choose; one seed after the other, so that a sweep cut short is even."""
        for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.seeds):
            for method in self.methods:
                for lr in self.lrs_of(method):
                    for strength in self.strengths_of(method):
                        yield Cell(seed, method, strength, lr)

    def what_is_trained(self) -> dict[str, Any]:
        """Everything that must be equal for two sets of raw results to be joined."""
        return {"workload": self.workload, "options": dict(self.options), **asdict(self.settings)}


def methods_of_strategies(strategies: Sequence[str]) -> tuple[str, ...]:
    """The methods that split by one of these strategies."""
    return tuple(row.name for row in METHODS.values() if row.strategy in strategies)


def run_cell(grid: Grid, cell: Cell) -> dict[str, Any]:
    """Build the task, train it, and return one row of raw results: numbers, strings, and lists of them."""
    row = workload(grid.workload)
    task = row.build(seed=cell.seed, **grid.options)
    result = train(task, cell.method, lr=cell.lr, strength=cell.strength, settings=grid.settings)
    score = float(result.metrics[row.metric])
    return {
        **asdict(cell),
        "score": score,
        "diverged": result.diverged,
        "steps_run": len(result.losses),
        "seconds": round(result.seconds, 3),
        "cpu_ms_a_step": round(result.cpu_ms_a_step, 3),
        "state_per_weight": round(result.state_per_weight, 3),
        "num_bins": result.num_bins,
        "scaled_share": result.scaled_share,
        "zeroed_share": result.zeroed_share,
        "worst": [[name, scale] for name, scale in result.worst],
        "metrics": result.metrics,
        "losses": thinned(result.losses),
    }


def thinned(losses: Sequence[float], points: int = CURVE_POINTS) -> list[float]:
    """Means over about `points` equal stretches, five significant digits, so that a curve fits in a raw file.

    >>> thinned([4.0, 2.0, 1.0, 1.0], points=2)
    [3.0, 1.0]
    """
    stride = max(1, len(losses) // points)
    return [float(f"{statistics.fmean(losses[i : i + stride]):.5g}") for i in range(0, len(losses), stride)]
