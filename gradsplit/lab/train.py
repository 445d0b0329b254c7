"""One run: a task trained by a method, stopped early where it has diverged, scored at the end, and watched on request.

The loss is read from the device every few steps only, many at once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import gradsplit as gs

from ..budget import Nodes
from ..distributed import make_kernel
from ..plan import named_trainable
from .controls import Tally
from .methods import Arrangement, Method, arrange, method_named
from .optimizers import Settings, state_per_weight
from .task import Task

__all__ = ["LOST", "READ_EVERY", "Result", "smoothed", "steps_to", "train", "NormHistory", "NormWatch"]

READ_EVERY = 10  # steps between two reads of the losses
LOST = 1e6  # times the first loss: beyond this a run is lost, not merely bad
WINDOW = 25  # steps of the running mean by which losses are compared


@dataclass
class Result:
    """What a run left behind.

    Attributes:
        metrics: from `Task.evaluate` after the last step.
        losses: one per step, as far as it went; not finite where the loss was not.
        diverged: the loss was not finite or above `LOST` times its start to the end, or weights are not finite.
        seconds: wall time of the training alone.
        cpu_ms_a_step: processor time, milliseconds: the median over stretches of `READ_EVERY` steps, so that neither
            other processes nor what is compiled in the first steps lengthens it.
        state_per_weight: bytes that the optimizer keeps over bytes of weights.
        scaled_share: share of all (bin, step) pairs that were scaled; None: nothing counts them.
        zeroed_share: the same for bins that were not finite.
        worst: (name, geometric mean scale) of the bins bounded hardest.
        num_bins: how many bins there are; 0: nothing is split.
        norms: norms of all nodes, if they were watched.
        example: from `Task.example`, if the run was watched.
    """

    metrics: dict[str, float]
    losses: list[float]
    diverged: bool
    seconds: float
    cpu_ms_a_step: float = 0.0
    state_per_weight: float = 0.0
    scaled_share: float | None = None
    zeroed_share: float | None = None
    worst: list[tuple[str, float]] = field(default_factory=list)
    num_bins: int = 0
    norms: NormHistory | None = None
    example: dict[str, Any] | None = None


def train(
    task: Task,
    method: Method | str,
    *,
    lr: float,
    settings: Settings,
    strength: float | None = None,
    watch: bool = False,
    on_progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Result:
    """Train a task from its initial weights and score it.

    Args:
        task: freshly built; its model is changed.
        method: a row of `METHODS`, or its name.
        lr: learning rate > 0.
        settings: steps, optimizer, schedule, warm-up.
        strength: in the method's unit; None where it has nothing to tune.
        watch: keep the norms of all nodes, at the price of two more measurements on the steps kept, and an example.
        on_progress: called with the number of steps done and the last loss, every `READ_EVERY` steps.

    Returns:
        The result. A run counts as lost when its loss has been bad for a twentieth of all steps (at least
        `READ_EVERY`) without a break; it then stops.
    """
    row = method_named(method) if isinstance(method, str) else method
    arrangement = arrange(row, task, lr, strength, settings)
    model, watcher = task.model, NormWatch(task.model, settings.steps) if watch else None
    patience = max(READ_EVERY, settings.steps // 20)
    losses: list[float] = []
    unread: list[Tensor] = []
    bad_for, start, cpu_from = 0, time.perf_counter(), time.process_time()
    cpu_of_stretches: list[float] = []
    arrangement.mode(training=True)
    for step in range(settings.steps):
        arrangement.optimizer.zero_grad()
        loss = task.loss(model, task.batch(step))
        torch.autograd.backward(loss)
        _update(arrangement, watcher, step)
        unread.append(loss.detach())
        if len(unread) == READ_EVERY or step == settings.steps - 1:
            cpu_of_stretches.append((time.process_time() - cpu_from) / len(unread))
            losses += torch.stack(unread).double().cpu().tolist()
            unread.clear()
            bad_for = _bad_at_the_end(losses)
            on_progress(step + 1, losses[-1])
            cpu_from = time.process_time()
            if bad_for >= patience:
                break
    seconds = time.perf_counter() - start
    arrangement.mode(training=False)
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    result = Result(task.evaluate(model), losses, bad_for >= patience or not finite, seconds)
    result.cpu_ms_a_step = 1e3 * statistics.median(cpu_of_stretches)
    result.state_per_weight = state_per_weight(arrangement.optimizer, model)
    _count(result, arrangement.control.tally)
    if watcher is not None:
        result.norms, result.example = watcher.history, task.example(model)
    return result


def _update(arrangement: Arrangement, watcher: NormWatch | None, step: int) -> None:
    if watcher is None or not watcher.wants(step):
        arrangement.update()
        return
    watcher.before(step)
    arrangement.update()
    watcher.after()


def _bad_at_the_end(losses: list[float]) -> int:
    """How many of the last losses without a break are lost."""
    first = losses[0] if math.isfinite(losses[0]) else 1.0
    for count, loss in enumerate(reversed(losses)):
        if math.isfinite(loss) and loss <= LOST * abs(first):
            return count
    return len(losses)


def _count(result: Result, tally: Tally | None) -> None:
    if tally is not None:
        result.scaled_share, result.zeroed_share = tally.scaled_share, tally.zeroed_share
        result.worst, result.num_bins = tally.worst(), tally.num_bins


def smoothed(losses: list[float], window: int = WINDOW) -> list[float]:
    """Running mean over the last `window` losses, one per step from the window's end on.

    >>> smoothed([4.0, 2.0, 0.0], window=2)
    [3.0, 1.0]
    """
    window = min(window, len(losses))
    return [math.fsum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)] if losses else []


def steps_to(losses: list[float], target: float, window: int = WINDOW) -> int | None:
    """Steps until the running mean of the loss is at most `target`; None: never.

    >>> steps_to([4.0, 2.0, 0.0, 0.0], 1.0, window=2)
    3
    """
    window = min(window, len(losses))
    return next((i + window for i, mean in enumerate(smoothed(losses, window)) if mean <= target), None)


COLUMNS = 120  # steps kept per run, evenly spread; a heat map has no pixels for more


@dataclass
class NormHistory:
    """L2 norms of nodes, (steps kept, N), gradient units.

    Attributes:
        names: (N,) names of the nodes, root first, each module before what is in it.
        levels: (N,) "root", "module" or "tensor".
        steps: the steps kept.
        before: N norms per kept step, as measured; not finite where an entry was not.
        after: the same after control; equal to `before` where nothing acts on gradients.
    """

    names: list[str]
    levels: list[str]
    steps: list[int] = field(default_factory=list)
    before: list[list[float]] = field(default_factory=list)
    after: list[list[float]] = field(default_factory=list)


class NormWatch:
    """Measures the module tree's nodes on every `total / COLUMNS`-th step.

    Args:
        model: whose gradients to measure.
        total: steps of the run.
    """

    def __init__(self, model: nn.Module, total: int) -> None:
        pairs = named_trainable(model)
        self.parameters: list[Tensor] = [parameter for _, parameter in pairs]
        plan = gs.tree_sp(gs.layout_of(model))
        self.kernel = make_kernel(plan, self.parameters, call="NormWatch")
        self.plan, nodes = plan, plan.nodes
        self.kept = _worth_showing(plan)
        self.history = NormHistory([nodes[i].name for i in self.kept], [nodes[i].level for i in self.kept])
        self.every = max(1, total // COLUMNS)

    def wants(self, step: int) -> bool:
        """Whether this step is kept."""
        return step % self.every == 0

    def before(self, step: int) -> None:
        """Measure what backward left."""
        self.history.steps.append(step)
        self.history.before.append(self._norms())

    def after(self) -> None:
        """Measure what control left."""
        self.history.after.append(self._norms())

    @torch.no_grad()
    def _norms(self) -> list[float]:
        gradients: list[Any] = [parameter.grad for parameter in self.parameters]
        squares_B = self.kernel.squares(gradients)
        squares_N = Nodes.of(self.plan, squares_B).sums_N(squares_B)
        return squares_N.sqrt()[self.kept].cpu().tolist()


def _worth_showing(plan: gs.Plan) -> list[int]:
    """The tree's nodes down to the tensors, depth first; a module with one child is left out: it says the same."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(plan.parents_N.tolist()):
        children.setdefault(parent, []).append(node)
    # As the layout has them: the tree numbers nodes level by level.
    place = {name: at for at, name in enumerate(plan.layout.names)}
    nodes, order, waiting = plan.nodes, [], [0]

    def first_tensor(node: int) -> int:
        while nodes[node].level != "tensor":
            node = children[node][0]
        return place[nodes[node].name]

    while waiting:
        node = waiting.pop()
        level = nodes[node].level
        below = [] if level == "tensor" else sorted(children[node], key=first_tensor, reverse=True)
        if level in ("root", "tensor") or len(below) > 1:
            order.append(node)
        waiting += below
    return order
