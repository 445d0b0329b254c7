"""ChainSplitter: it bounds the signal at the joints of a model while it trains, and beside forks its modules."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..budget import Budget, Fixed, RunningMedian
from ..hooks import attach_to
from ..optimizers import follows_gradient
from ..plan import Boxes, Layout, Plan, one_device
from ..split import Split
from ..xp import torch_xp
from .forks import ForkMemory, ForkWatch
from .graph import Accumulation, CallTrace, ModelHook, batched, tracing
from .joints import bare, carries_signal, checked_names, layers_of, tensors_in
from .signal_limits import JointMemory, SignalGuard


@dataclass(frozen=True)
class JointRow:
    """One joint, or one branch of a task fork, after the steps so far.

    Attributes:
        name: the joint, or `fork->branch`.
        role: "layer" or "task".
        norm: L2 norm of the last signal before any bound.
        limit: the limit on the last signal, inf if there was none.
        bounded: number of backward passes in which the signal was scaled.
        nonfinite: number of backward passes in which it was not finite.
    """

    name: str
    role: str
    norm: float
    limit: float
    bounded: int
    nonfinite: int


_SHOWN = ("norm", "limit", "bounded", "nonfinite")
_LISTS = ("maximum_K", "norm_K", "bounded_K", "nonfinite_K")


_ALONE = (
    "ChainSplitter bounds a task fork ({forks}) without per-module limits on the parameters. Alone, or with a global "
    "clip beside it, the fork rule trained worse than nothing in the project's trials, since the heads themselves stay "
    "unbounded. Use .attach(optimizer), call .bound_parameters() before optimizer.step(), or put a GradientSplitter "
    "with more than one bin in front of the optimizer and pass it as parameters=."
)


def modules_with_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every module that owns trainable parameters itself, with these parameters; a tied one counts once.

    >>> list(modules_with_parameters(nn.Sequential(nn.Linear(2, 2), nn.Tanh())))
    ['0']
    """
    seen: set[int] = set()
    owners: dict[str, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            owners[name or "(root)"] = own
    return owners


class ModuleLimits:
    """Bound the gradient of every module by its equal part of one total, in place.

        limit = total / sqrt(M);  g_m <- g_m min(1, limit / ||g_m||);  a module that is not finite is zeroed

    The squares of all modules add to at most total^2, so this bounds the whole gradient by ``total`` too. No module can
    take another's part. Sharded parameters cost one all-reduce per step.

    Args:
        owners: the parameters of each of the M modules, by its name.
        total: L2 norm, gradient units, > 0.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.weight.grad = torch.full((1, 1), 5.0)
    >>> ModuleLimits({"layer": [layer.weight]}).bound_().tolist(), layer.weight.grad.item()
    ([5.0], 1.0)
    """

    def __init__(self, owners: Mapping[str, Sequence[nn.Parameter]], total: float = 1.0) -> None:
        pairs = [(f"{name}/{i}", p) for name, own in owners.items() for i, p in enumerate(own)]
        self.parameters = [p for _, p in pairs]
        layout = Layout(tuple(name for name, _ in pairs), tuple(tuple(int(n) for n in p.shape) for _, p in pairs))
        one_device(pairs, call="ChainSplitter")
        rows, cols = np.array(layout.rows), np.array(layout.cols)
        module_T = np.repeat(np.arange(len(owners)), [len(own) for own in owners.values()])
        zeros, filled = np.zeros_like(rows), rows * cols > 0
        columns = (np.arange(len(rows)), zeros, rows, zeros, cols, np.unique(module_T[filled], return_inverse=True)[1])
        boxes = Boxes.from_columns(*(column[filled] for column in columns[:5]), columns[5].reshape(-1))
        plan, tensors = Plan(layout, boxes), [torch.view_as_real(p) if p.is_complex() else p for p in self.parameters]
        limit = total / math.sqrt(max(1, plan.num_bins))
        self.split = Split(plan, tensors, Fixed(limit), call="ChainSplitter")

    @torch.no_grad()
    def bound_(self) -> Tensor:
        """Bound the gradients as they are now; return the norms before, (M,), inf where not finite; no host sync."""
        for p in self.parameters:
            if p.grad is not None and p.grad.is_conj():  # autograd leaves conjugates to be worked out
                p.grad = p.grad.resolve_conj()
        gradients = [None if p.grad is None else p.grad for p in self.parameters]
        gradients = [torch.view_as_real(g) if g is not None and g.is_complex() else g for g in gradients]
        _, decision = self.split.bound_(gradients)
        norms: Tensor = torch.where(decision.finite_B, decision.norm_B, math.inf)
        return norms


class ChainSplitter:
    """Bound the signal (the gradient of an activation) where it passes from one part of a model to the next.

        d <- d min(1, limit / ||d||)        at every joint;  zeros where d is not finite

    Ordinary joints have a guard: the limit is 3 x a running median of the joint's own norm, so only a sudden explosion
    is bounded. Task forks have the fork rule: each branch has a slowly decaying maximum of its norm, and the limit is
    the smallest of these maxima. Residual adds are never bounded as forks. Some optimizers, such as Adam, make steps
    that do not follow the gradient's size. In front of them "auto" leaves out the fork rule and the limits of modules.
    There these would only set the shares of the heads, which costs where nothing explodes.

    The hooks act in backward passes that accumulate into parameters, and in no other. So `torch.autograd.grad`, also
    inside a loss, gives the true gradient. A copy of an attached model (deep, pickled, averaged, saved) is free.

    The statistics stay on the signals' device. They describe this process's part of the batch, so under
    DistributedDataParallel and FSDP2 each rank bounds its own signals. Every backward pass is one observation, and so
    is every accumulated micro-batch.

    Args:
        model: the module to control; under DistributedDataParallel the module inside.
        at: "layers", "forks", "auto", or names of modules whose outputs are guarded. "auto" means layers and task
            forks, but no forks if the splitter is attached to an optimizer such as Adam.
        budget: gives the limits of ordinary joints from their own norms; None means `RunningMedian(3.0)`. With a limit
            of inf the splitter only measures.
        forks: modules whose output is a task fork, for forks that the structure does not show.
        parameters: what bounds the parameters beside a task fork. "modules" bounds each module by `total` / sqrt(number
            of modules), through `.attach(optimizer)` or `.bound_parameters()`. Otherwise a GradientSplitter or GSO of
            the caller's, or None.
        total: limit on the L2 norm of all modules together, gradient units.
        per_sample: whether to bound each sample's signal instead of the batch's.
        steps: whether to guard modules that are called several times in one forward pass (time steps) too.
        on_nonfinite: "zero", or "pass", which a GradScaler needs, since it looks for the inf itself.

    Raises:
        ValueError: an unknown option, or a name that the model does not have; the error offers the nearest names.
        RuntimeError: an attached model runs inside `torch.func.vmap`, where no signal can be bounded.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> with ChainSplitter(model, at="layers") as chain:
    ...     model(torch.ones(1, 2)).sum().backward()
    >>> [row.name for row in chain.rows()]
    ['0', '2']

    Source: the project's trials; the guard's median is Andrew et al. 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        at: str | Sequence[str] = "auto",
        budget: Budget | None = None,
        *,
        forks: Sequence[str] = (),
        parameters: Any = "modules",
        total: float = 1.0,
        per_sample: bool = False,
        steps: bool = False,
        on_nonfinite: str = "zero",
    ) -> None:
        choices: Any = at
        listed = isinstance(choices, Iterable) and not isinstance(choices, str) and list(choices)
        if not listed and choices not in ("auto", "forks", "layers"):
            raise ValueError(f"ChainSplitter(at={at!r}): expected 'auto', 'forks', 'layers' or a list of module names.")
        if on_nonfinite not in ("zero", "pass"):
            raise ValueError(f"ChainSplitter(on_nonfinite={on_nonfinite!r}): expected 'zero' or 'pass'.")
        if budget is not None and (not isinstance(budget, Budget) or budget.reads_weights or budget.bounds_update):
            raise ValueError(
                f"ChainSplitter(budget={budget!r}): expected a budget of norms alone, since a joint has no weights. "
                "Use RunningMedian(3.0), Fixed, Ema, ZScore or Percentile."
            )
        if isinstance(parameters, str) and parameters != "modules":
            raise ValueError(
                f"ChainSplitter(parameters={parameters!r}): expected 'modules', None, or the GradientSplitter or GSO "
                "that bounds the parameters. Leave it out for limits per module."
            )
        if not total > 0:
            raise ValueError(
                f"ChainSplitter(total={total!r}): expected an L2 norm above 0. Use 1.0, or math.inf for no limit."
            )
        self.model = bare(model, call="ChainSplitter")
        if isinstance(at, str):
            self.names = [] if at == "forks" else layers_of(self.model)
            if at == "layers" and not self.names:
                raise ValueError(
                    f"ChainSplitter({type(self.model).__name__}, at='layers'): expected a model with modules inside "
                    "that have parameters, got one without. Put it into an nn.Sequential, whose layer it then is."
                )
        else:
            self.names = checked_names(self.model, at, f"ChainSplitter(at={list(at)!r})")
        declared = checked_names(self.model, forks, f"ChainSplitter(forks={list(forks)!r})")
        self.at = at if isinstance(at, str) else "names"
        zero = on_nonfinite == "zero"
        self.guard = SignalGuard(budget or RunningMedian(), per_sample, steps, zero)
        self.watch = ForkWatch(declared, at in ("auto", "forks"), per_sample, zero)
        self.parameters, self.total = parameters, total
        self.owners = modules_with_parameters(self.model)
        self.module_norms: Tensor | None = None
        self._limits: ModuleLimits | None = None  # made at the first step, when a wrapper has sharded what it shards
        self._handles: list[Any] = []
        self._generation = 0
        self._trace: CallTrace | None = None
        self._tracing: Any = None
        self._unbounded, self._warned, self._bounds = 0, False, False
        self._accumulation = Accumulation()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: the options and the statistics; it is not attached."""
        passing: dict[str, Any] = {
            "_handles": [],
            "_trace": None,
            "_tracing": None,
            "_limits": None,
            "module_norms": None,
        }
        return {**self.__dict__, **passing}

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> ChainSplitter:
        """Set the hooks; with an optimizer, also bound the parameters by module before each of its steps.

        The optimizer decides whether "auto" bounds task forks: under SGD it does, under Adam it does not.

        Returns:
            This splitter; `.remove()` takes off all hooks again.

        Raises:
            RuntimeError: it is attached already.
            TypeError: no optimizer, or one that runs no hooks; nothing is attached then.
        """
        if self._handles:
            raise RuntimeError(
                "ChainSplitter.attach(): expected a splitter without hooks, got an attached one. Call .remove() first."
            )
        if optimizer is not None:
            given: Any = optimizer
            if not isinstance(given, torch.optim.Optimizer):
                raise TypeError(
                    f"ChainSplitter.attach({type(given).__name__}): expected a torch.optim.Optimizer. Pass the one "
                    "that steps the model's parameters."
                )
            self._handles.append(attach_to(optimizer, before=self.bound_parameters))
        self._bounds = optimizer is not None
        self._generation += 1
        self.guard.new_pass()
        if self.at == "auto":
            self.watch.automatic = optimizer is None or follows_gradient(optimizer)
        modules = dict(self.model.named_modules())
        for name in dict.fromkeys([*self.names, *self.watch.declared]):
            self._handles.append(modules[name].register_forward_hook(ModelHook(self._output_hook(name))))
        if self.watch.active:
            self._tracing = tracing(self.model)
            self._trace = self._tracing.__enter__()
        self._handles.append(self.model.register_forward_pre_hook(ModelHook(self._start), with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(ModelHook(self._finish)))
        return self

    def remove(self) -> None:
        """Take off every hook; a graph that still holds one of this splitter's hooks passes its signals unchanged."""
        self._generation += 1
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stop_tracing()

    def __enter__(self) -> ChainSplitter:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.remove()

    def bound_parameters(self) -> None:
        """Bound the parameters' gradients by module if a task fork is bounded and `parameters="modules"`."""
        self._unbounded = 0
        if self.watch.active and self.watch.memories and self.parameters == "modules":
            if self._limits is None:
                self._limits = ModuleLimits(self.owners, self.total)
            self.module_norms = self._limits.bound_()

    def rows(self) -> list[JointRow]:
        """One row per joint that has carried a signal: last norm, limit and counts; this waits for the device."""
        rows = []
        for name, m in sorted(self.guard.memories.items()):
            bounded, nonfinite = int(m.bounded[0]), int(m.nonfinite[0])
            rows.append(JointRow(name, "layer", float(m.norm[0]), float(m.limit[0]), bounded, nonfinite))
        for fork in self.watch.memories:
            if not fork.maximum_K:
                continue
            limit = min((float(m) for m in fork.maximum_K if m > 0), default=math.inf)
            for k, branch in enumerate(fork.branches):
                name, counts = f"{fork.name}->{branch}", (int(fork.bounded_K[k]), int(fork.nonfinite_K[k]))
                rows.append(JointRow(name, "task", float(fork.norm_K[k]), limit, *counts))
        return rows

    def worst(self, k: int = 5) -> list[JointRow]:
        """The joints that were not finite most often, then those that were bounded most often."""
        return sorted(self.rows(), key=lambda row: (-row.nonfinite, -row.bounded, row.name))[:k]

    def state_dict(self) -> dict[str, Any]:
        """The running medians and maxima, by joint: plain containers of tensors and numbers."""
        joints = {
            name: {
                "state": [torch.as_tensor(part) for part in m.state],
                **{key: torch.as_tensor(getattr(m, key)) for key in _SHOWN},
            }
            for name, m in self.guard.memories.items()
        }
        forks = [
            {
                "name": f.name,
                "branches": list(f.branches),
                **{key: [v.clone() for v in getattr(f, key)] for key in _LISTS},
            }
            for f in self.watch.memories
        ]
        return {"joints": joints, "forks": forks, "repeated": sorted(self.guard.repeated)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; joints that do not occur again keep it unused.

        Raises:
            KeyError: the dictionary does not come from a ChainSplitter; nothing is taken over then.
        """
        if missing := sorted({"joints", "forks", "repeated"}.difference(state)):
            raise KeyError(
                f"ChainSplitter.load_state_dict(state): expected what its state_dict() gave, got one without "
                f"{missing[0]!r}. Pass that dictionary whole."
            )
        joints = {
            name: JointMemory(
                self.guard.budget.restored(torch_xp, tuple(entry["state"])), *(entry[key] for key in _SHOWN)
            )
            for name, entry in state["joints"].items()
        }
        forks = [ForkMemory(f["name"], tuple(f["branches"]), *(list(f[key]) for key in _LISTS)) for f in state["forks"]]
        self.guard.repeated = set(state["repeated"])
        self.guard.memories, self.watch.memories = joints, forks
        self.watch.forget_plan()

    def _alive(self) -> Any:
        generation, me = self._generation, weakref.ref(self)

        def alive() -> bool:
            splitter = me()
            if splitter is None or splitter._generation != generation:
                return False
            return splitter._accumulation.running()

        return alive

    def _output_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                given = {id(tensor) for _, tensor in tensors_in(args)}
                made = [(p, t) for p, t in tensors_in(output) if self._meets(name, t) and id(t) not in given]
                self.guard.meet(name, made, self._alive(), bound=name in self.names)

        return hook

    def _meets(self, name: str, tensor: Tensor) -> bool:
        if batched(tensor):
            raise RuntimeError(
                f"ChainSplitter.attach(): expected a forward pass outside of torch.func.vmap, got one inside at "
                f"{name!r}, where no signal can be bounded. Call .remove() before it, or leave vmap out and bound each "
                "sample with per_sample=True."
            )
        return carries_signal(tensor)

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self.guard.new_pass()
        self._accumulation.note_inputs(tensor for _, tensor in tensors_in((args, kwargs)))
        if self._trace is not None:
            self._trace.calls.clear()

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or not self.watch.active:
            return
        outputs = [tensor for _, tensor in tensors_in(output) if carries_signal(tensor)]
        if not outputs:
            return
        self.guard.leave_alone(self.watch.read(outputs, self._trace, self.guard.made_by, self._alive()))
        self._stop_tracing()
        self._check_parameters()

    def _stop_tracing(self) -> None:
        if self._tracing is not None:
            self._tracing.__exit__(None, None, None)
        self._tracing = self._trace = None

    def _check_parameters(self) -> None:
        if not self.watch.memories or self._warned:
            return
        self._unbounded += 1
        plan = getattr(self.parameters, "plan", None)
        alone = self.parameters is None or (plan is not None and plan.num_bins == 1)
        if alone or (self.parameters == "modules" and not self._bounds and self._unbounded > 2):
            self._warned = True
            forks = "; ".join(f"{memory.name} -> {', '.join(memory.branches)}" for memory in self.watch.memories)
            warnings.warn(_ALONE.format(forks=forks), UserWarning, stacklevel=2)
