"""GSO, the gradient-splitting optimizer: rows bounded, a direction per tensor, a step that is a share of the row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..amp import Scaling, undisturbed, with_cpu_default
from ..budget import DEFAULT_OF_GSO, Relative
from ..collective import Collective
from ..hooks import constant_while_traced, not_traced, users_level, without_compiler_guard
from ..plan import refuse_lazy
from ..rates import Clock, SecondSchedule, refuse_endless
from ..series import Series
from ..split import StepRecord, checked_sinks
from .in_backward import InBackward, check_model
from .kinds import Kind, check_names, kinds_of, owners_of
from .options import FLAGS, check_flags, check_group, check_numbers, check_params, check_share, differentiable_backend
from .parts import Part, make_memories, make_parts, step_part
from .saved import (
    COUNT,
    HISTORY,
    check_constants,
    check_moments,
    check_saved,
    load_history,
    mend_memories,
    translated,
)
from .share import ShareUpdate

__all__ = ["GSO"]

_KEPT = (
    *("_options", "_overrides", "_shared_groups", "_one_tensor_a_part", "_kinds"),
    *("_steps", "_told", "_schedules", "_direction", "_blocks"),
)
"""What a copy takes over; parts and hooks are made anew, for its own parameters."""


class GSO(Optimizer):
    """Bound each row, choose a direction per tensor, and move each row by a share of its own length.

    Per row b with gradient g, weights w of n entries, and the share tau (``lr``, moved by any scheduler):

        g'_b = g_b min(1, 0.2 max(||w_b||, 1e-3) / ||g_b||)      before any memory; a row that is not finite stays
        D    = matrices: momentum made orthogonal;  embeddings and vectors: Adam's direction
        w_b <- (1 - decay tau) w_b - tau max(||w_b||, 0.1 sqrt n) d_b / ||d_b||
        w_b <- w_b min(1, max(||w_b at the start||, 3) / ||w_b||)                                    matrices

    Where both sides of a matrix exceed 64, 0.1 becomes 0.8 / sqrt(smaller side). Vectors move by tau / 3 and count as
    at least sqrt n long. A gradient that is scaled as a whole is told from single rows by the median over rows of
    ||g_b|| / its recent norm; above 5 all is divided by it. Where H > 14 layers stand in series, tau is multiplied by
    (14 / H)^2. Vectors may change the loss by no more than matrices do (`gradsplit.series` has both rules). All
    formulas: `gradsplit.optim.share`; directions: `gradsplit.optim.directions`.

    Nothing has to be tuned: no rate in units of weights, no clip, no warm-up. The schedule matters: linear to zero is
    best (``steps=``). From Muon (Jordan et al. 2024), LARS and LAMB (You et al. 2017, 2020), Nero (Liu et al. 2021) and
    AGC (Brock et al. 2021). New here: bounds per row before the memory, a share per row after the orthogonal
    direction, a limit on growth, one number for every kind of tensor, the collective rule.

    ``direction="adam"`` is AdamW over bins: lr is AdamW's learning rate, ``budget`` bounds the gradient before the
    moments and the update after them. With a limit of inf it is `torch.optim.AdamW` to rounding:

        m = b1 m + (1 - b1) g'         v = b2 v + (1 - b2) g'^2     (or one v per bin)
        u = lr mhat / (sqrt(vhat) + eps)
        c_b = min(1, 0.03 (lr / lr_max) max(||w_b||, 0.01 sqrt(n_b)) / ||u_b||)
        w = w - c_b (u + lr weight_decay w)

    Args:
        params: a module, parameters, pairs (name, parameter), or groups; a group may carry its own ``plan``, ``budget``
            and ``direction``. With a module each tensor's kind is known; else its shape decides.
        lr: the share of its length by which a row moves per step, in [0, 0.5]; default 0.03. With direction="adam"
            the learning rate, default 0.01. A float or a 0-d tensor.
        betas: decay of the two memories, in [0, 1); default (0.9, 0.99), with direction="adam" (0.9, 0.999).
        eps: added to Adam's denominator, >= 0.
        weight_decay: decoupled, per step and unit of lr, >= 0.
        steps: the length of the run; the share then falls linearly to zero. None: the share is what ``lr`` says. Not
            together with a scheduler.
        direction: "auto", the name of a direction for all tensors, a mapping from name patterns to directions, a
            function (name, parameter) -> direction or None, or "adam", see above.
        blocks: parts of matrices that are made orthogonal one by one: a plan, whose bins they are, or a mapping from
            name patterns to numbers of equal blocks of rows, ``{"*.qkv.weight": 3}``.
        plan: see `GradientSplitter`.
        budget: a budget of gradients, its name, a tuple, or a mapping from levels; default ``Relative(0.2)``. With
            direction="adam" those that bound the update act on the update; default
            ``(Relative(0.2), RelativeStep(0.03))``.
        second_moment: with direction="adam": "element", or "bin": one per bin, which saves a copy of the weights.
        rule: "bottom_up" or "nearest", see `project`.
        maximize: ascend.
        foreach: None or False; there is no multi-tensor kernel for scales of bins.
        capturable: keep the step counters beside the parameters, so that a step can be captured in a graph.
        differentiable: let autograd see the update; with direction="adam", in eager torch.
        fused: True asks for a compiled update and raises where there is none; False for eager torch; None: what
            the backend has.
        backend, process_group, stages: see `GradientSplitter`.
        in_backward: update each parameter as soon as backward has completed its gradient, and free the gradient; needs
            limits that look at one tensor each. ``step()`` then only ends the step; see `accumulating`.
        sinks: functions called with the record of every part after every step, a `ShareRecord`: what was bounded, which
            rows are at their growth limit, by how much each step was turned. A traced step leaves its graph for them.

    Raises:
        ValueError: a constant out of its range, no parameters, an unknown name; a direction without a rule for a
            tensor; flags without a meaning here.
        RuntimeError: a sparse gradient; flags that exclude each other.

    >>> w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> opt = GSO([w], lr=0.1, weight_decay=0.0)
    >>> w.grad = torch.tensor([[1e9, 0.0]])
    >>> opt.step()                            # a tenth of the row's length, 5
    >>> w.data
    tensor([[2.5000, 4.0000]])
    """

    # GradScaler then hands scale and overflow to `step`, which heeds both without waiting for the device.
    _step_supports_amp_scaling = True
    bounds_gradients = True  # a splitter in front says that bounds hold twice

    @with_cpu_default
    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        steps: int | None = None,
        direction: str | Mapping[str, str] | Callable[[str, Tensor], str | None] = "auto",
        blocks: Any = None,
        plan: Any = "xsp",
        budget: Any = None,
        second_moment: str = "element",
        rule: str = "bottom_up",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        process_group: Any = None,
        stages: Any = None,
        in_backward: bool = False,
        sinks: Iterable[Callable[[StepRecord], None]] = (),
    ) -> None:
        by_share = direction != "adam"
        if second_moment not in ("element", "bin"):
            raise ValueError(f"GSO(second_moment={second_moment!r}): expected 'element' or 'bin'.")
        if by_share:
            check_share(steps, second_moment=second_moment, differentiable=differentiable)
            check_names(direction, blocks, [])
        elif steps is not None or blocks is not None:
            raise ValueError(
                "GSO(direction='adam', …): expected neither steps= nor blocks=, which belong to the share step. Use a "
                "scheduler of torch, or leave direction= out."
            )
        if in_backward:
            check_model(params)
        if differentiable:
            backend = differentiable_backend(backend, in_backward=in_backward)
        usual = Relative(0.2) if by_share else DEFAULT_OF_GSO
        self._options = {
            "plan": plan,
            "budget": usual if budget is None else budget,
            "rule": rule,
            "backend": backend,
            "second_moment": second_moment,
            "process_group": process_group,
            "stages": stages,
            "fused": False if differentiable else fused,
        }
        self._direction, self._blocks, self.measures = direction, blocks, False
        self.sinks = checked_sinks(sinks, call="GSO")
        self._one_tensor_a_part = in_backward
        self._in_backward: InBackward | None = None
        self._overrides: list[dict[str, Any]] = []
        self._kinds: list[list[Kind]] = []  # of each group, one per parameter
        self._shared_groups = 0
        self._parts: list[Part] = []
        self._steps, self._told, self._schedules = None if steps is None else int(steps), False, SecondSchedule(steps)
        self._owners: dict[int, tuple[nn.Module, str]] = {}
        if isinstance(params, nn.Module):
            model: nn.Module = getattr(params, "_orig_mod", params)  # torch.compile puts it behind a prefix
            params, self._owners = list(model.named_parameters()), owners_of(model)
        defaults: dict[str, Any] = {
            "lr": (0.03 if by_share else 1e-2) if lr is None else lr,
            "betas": ((0.9, 0.99) if by_share else (0.9, 0.999)) if betas is None else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_numbers(defaults, by_share=by_share)
        check_flags(defaults, defaults)
        check_params(params)  # behind the constants, as torch does it
        super().__init__(params, defaults)
        if by_share:
            check_names(direction, blocks, [name for group in self.param_groups for name in _names_of(group)])
        self._shared_groups = len(self.param_groups)
        self._build(0)
        if in_backward:
            self._in_backward = InBackward(self)

    @property
    def by_share(self) -> bool:
        """Whether rows move by a share of their length; else this is AdamW over bins."""
        return self._direction != "adam"

    @with_cpu_default
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, or a module, under the optimizer's options or its own ``plan``, ``budget`` and ``direction``.

        Where the other groups have names and these have none, they are called by their places.

        Raises:
            TypeError: something that is no mapping with "params".
            ValueError: as at construction; everything is as it was then.
        """
        if self._in_backward is not None:
            raise ValueError(
                "GSO.add_param_group(…): expected all parameters at construction with in_backward=True. Make a second "
                "GSO for the new ones."
            )
        check_group(param_group)
        group = dict(param_group)
        override: dict[str, Any] = {key: group.pop(key) for key in ("plan", "budget") if key in group}
        direction = group.pop("direction", self._direction)
        check_numbers({**self.defaults, **group}, by_share=self.by_share)
        check_flags({**self.defaults, **group}, self.defaults)
        group["params"] = self._named(group["params"])
        if (
            isinstance(group["params"], (list, tuple))
            and not group["params"]
            and "param_names" in next(iter(self.param_groups), ())
        ):
            group["param_names"] = []
        if group.get("fused", self.defaults["fused"]) != self.defaults["fused"]:
            override["fused"] = group["fused"]
        without_compiler_guard(super().add_param_group)(group)
        self._overrides.append(override)
        try:
            self._kinds.append(self._kinds_of(self.param_groups[-1], direction))
            if self._shared_groups:  # after construction: a part of its own, so that no other history moves
                self._parts += self._made_part([len(self.param_groups) - 1], {**self._options, **override})
        except (ValueError, TypeError, IndexError):
            self.param_groups.pop()
            self._overrides.pop()
            del self._kinds[len(self.param_groups) :]
            raise

    def _named(self, params: Any) -> Any:
        """The parameters of a new group with names, where it is a module, or where the other groups have names."""
        if isinstance(params, nn.Module):
            self._owners |= owners_of(params)
            return list(params.named_parameters())
        if not self.param_groups or "param_names" not in self.param_groups[0]:
            return params
        given = [params] if isinstance(params, Tensor) else list(params)
        if any(not isinstance(one, Tensor) for one in given):
            return given
        return [(f"group{len(self.param_groups)}.param{j}", one) for j, one in enumerate(given)]

    def _kinds_of(self, group: dict[str, Any], direction: Any) -> list[Kind]:
        names = _names_of(group)
        for name, parameter in zip(names, group["params"], strict=True):
            refuse_lazy(name, parameter, call="GSO(…)")
        if not self.by_share:
            return []
        if direction is not self._direction:
            check_names(direction, None, names)
        return kinds_of(list(zip(names, group["params"], strict=True)), self._owners, direction, self._blocks)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, or to zero."""
        self._tell_of_the_end(reads_device=False)
        without_compiler_guard(super().zero_grad)(set_to_none)

    def _build(self, made: int) -> None:
        capturable = any(group["capturable"] for group in self.param_groups)
        first = next((p for group in self.param_groups for p in group["params"]), None)
        self._device = "cpu" if first is None else first.device.type
        self._clock = Clock(self._steps, first.device if capturable and first is not None else None)
        self._clock.set(made)
        self._collective = Collective(one_by_one=self._one_tensor_a_part)
        self._series = Series(None if first is None else first.device)
        shared = [i for i in range(self._shared_groups) if not self._overrides[i]]
        self._parts = self._made_part(shared, self._options) if shared else []
        for i in (i for i in range(len(self.param_groups)) if i not in shared):
            self._parts += self._made_part([i], {**self._options, **self._overrides[i]})

    def _made_part(self, groups: list[int], options: Mapping[str, Any]) -> list[Part]:
        return make_parts(
            self,
            groups,
            options,
            [kind for i in groups for kind in self._kinds[i]] if self.by_share else None,
            self._collective,
            self._clock,
            self._series,
            one_tensor_each=self._one_tensor_a_part,
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Under a GradScaler gradients may still carry its scale; on an overflow nothing moves, counts or learns.

        Args:
            closure: evaluates the model again and returns the loss; runs with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: ``steps=`` and a scheduler together; a learning rate or a decay that is not finite.

        Warns:
            UserWarning: more steps than ``steps=`` said; the share stays at zero. ``lr`` was changed beside ``steps=``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = Scaling.of_step(self)
        self._check_schedule()
        if self._in_backward is not None:
            self._in_backward.finish()
            self._collective.settle()
        undisturbed(self._device, self._update, scaling)
        if self._has_sinks():
            self._show()
        return loss

    def _update(self, scaling: Scaling | None) -> None:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._init_group()
            if self.by_share and self._in_backward is None:
                self._series.forget()  # what a step that failed has left
            for part in self._parts:
                self._step_part(part, scaling)
            if self.by_share:
                self._series.settle()
        self._clock.advance()

    # torch's compiler would look into the sinks, and trace anew whenever one of them has changed.
    @constant_while_traced
    def _has_sinks(self) -> bool:
        return bool(self.sinks)

    @constant_while_traced
    def _is_watched(self) -> bool:
        return self.measures or bool(self.sinks)

    @not_traced
    def _show(self) -> None:
        """Hand the records to the sinks; a traced step leaves its graph for it."""
        for record in self.records:
            for sink in self.sinks:
                sink(record)

    @property
    def records(self) -> list[StepRecord]:
        """What the last step did: one record per part; there is one part unless groups have plans of their own.

        By how much steps were turned is measured where there are sinks, or ``measures`` is set: see `ShareRecord`.
        """
        return [record for _, record in self.records_of()]

    def records_of(self) -> list[tuple[list[Tensor], StepRecord]]:
        """Return each record with its parameters, in the order of its layout."""
        self._tell_of_the_end()
        step = int(self._clock.made) - 1
        made = ((part.split.owners, part.record(step)) for part in self._parts)
        return [(owners, record) for owners, record in made if record is not None]

    def _check_schedule(self) -> None:
        refuse_endless(self, call="GSO.step()")
        for group in self.param_groups if self.by_share else ():
            if not isinstance(group["lr"], Tensor) or not torch.compiler.is_compiling():
                check_numbers(group, by_share=True)
        if self._steps is None:
            return
        if any("initial_lr" in group for group in self.param_groups):
            raise ValueError(
                f"GSO(steps={self._steps}): expected no scheduler beside steps=, which already lets the share fall to "
                "zero. Leave one of the two out."
            )
        self._schedules.look(self)
        self._tell_of_the_end(begun=1, reads_device=False)

    def _tell_of_the_end(self, *, begun: int = 0, reads_device: bool = True) -> None:
        """Warn once of a step beyond ``steps=``: when it begins, or behind a traced step at the next look from outside.

        Args:
            begun: 1 inside a step that is not counted yet.
            reads_device: look at a count for which a device must be waited for.
        """
        if self._steps is None or self._told or torch.compiler.is_compiling():
            return
        if not reads_device and self._clock.made.device.type != "cpu":
            return
        made = int(self._clock.made) + begun
        if made > self._steps:
            self._told = True
            warnings.warn(
                f"GSO(steps={self._steps}): step {made - 1} is beyond the end of the run, and the share stays at "
                "zero. Give steps= the whole length, or use a scheduler.",
                UserWarning,
                stacklevel=users_level(),
            )

    def _init_group(self) -> None:
        """Make the moments of every parameter that has its first gradient.

        Under this name, `torch.compile` runs it while it traces, so that moments are never made inside a graph.
        """
        for part in self._parts:
            make_memories(self, part, self._options["second_moment"])

    def _step_part(self, part: Part, scaling: Scaling | None = None) -> None:
        if isinstance(part.update, ShareUpdate):
            part.update.measures = self._is_watched()
        step_part(self, part, scaling, alone=self._one_tensor_a_part or not part.split.needs_others)

    def _step_of(self, owner: Tensor) -> None:
        """Update the one parameter whose gradient is complete, from inside backward."""
        self._check_schedule()
        (part,) = [part for part in self._parts if part.split.owners[0] is owner]
        make_memories(self, part, self._options["second_moment"])
        self._step_part(part)

    @property
    def updates_in_backward(self) -> bool:
        """Whether each parameter is updated during the backward pass."""
        return self._in_backward is not None

    def accumulating(self) -> AbstractContextManager[None]:
        """Let gradients add up over backward passes without updates, with ``in_backward=True``.

        All passes but the last go under it; the last one, outside, updates with the sum.

        Raises:
            ValueError: without ``in_backward=True``, where gradients add up anyway.
        """
        if self._in_backward is None:
            raise ValueError("GSO.accumulating(): expected in_backward=True; else gradients add up until step().")
        return self._in_backward.accumulating()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and under "gradsplit" what no parameter holds: histories, usual norms, the count."""
        self._tell_of_the_end()
        return {**without_compiler_guard(super().state_dict)(), **self._history()}

    def _history(self) -> dict[str, Any]:
        saved: dict[str, Any] = {HISTORY: [part.state() for part in self._parts]}
        return {**saved, COUNT: int(self._clock.made)} if self.by_share else saved

    @with_cpu_default
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` left off. Statistics per bin stay float32, whatever the parameters' dtype.

        The states of `torch.optim.AdamW` and `torch.optim.Muon` are taken over where they mean the same: a running mean
        of gradients is the momentum of a matrix. History begins here then, and the groups keep their constants, since
        a learning rate is no share.

        Raises:
            ValueError: the state of another model, plan or direction, of other budgets, or a damaged one.
        """
        check_saved(state_dict, self.param_groups)
        state_dict = self._translated(state_dict)
        check_constants(state_dict, self.param_groups, by_share=self.by_share)
        before, parts = self._history(), self._parts
        try:
            self._regroup(state_dict.get(HISTORY))
            load_history(self._parts, state_dict)
            without_compiler_guard(super().load_state_dict)(state_dict)
        except Exception:
            self._parts = parts
            load_history(self._parts, before)
            raise
        self._clock.set(int(state_dict.get(COUNT, 0)))
        self._schedules.forget()
        mend_memories(self, state_dict, by_share=self.by_share)

    def _translated(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The saved state in the names of this optimizer's memories; refuses what means something else."""
        if not self.by_share:
            check_moments(saved, self._options["second_moment"])
            return saved
        kinds = [kind for group in self._kinds for kind in group]
        return dict(translated(saved, kinds, self.param_groups))

    def _regroup(self, history: Any) -> None:
        """Make the parts of the saved run, whether its groups were given at once or added later."""
        wanted = [state.get("groups") for state in history or ()]
        here = [sorted(set(part.groups)) for part in self._parts]
        if self._in_backward is not None or not wanted or None in wanted or wanted == here:
            return
        if sorted(i for groups in wanted for i in groups) == sorted(i for groups in here for i in groups):
            made = (self._made_part(groups, {**self._options, **self._overrides[groups[0]]}) for groups in wanted)
            self._parts = [part for parts in made for part in parts]

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in _KEPT}
        if callable(self._direction):  # a function may not be picklable; what it chose is kept with the kinds
            own["_direction"] = "auto"
        own |= {"_owners": {}, "sinks": [], "measures": False}
        if callable(self._options["plan"]) and self._parts:  # a function may not be picklable; the plan it made is
            own["_options"] = {**self._options, "plan": self._parts[0].split.plan}
        own["_options"] = {**own["_options"], "process_group": None, "stages": None}  # a group ends with its process
        base: dict[str, Any] = super().__getstate__()
        return {**base, **own, "_history": [part.state() for part in self._parts], "_made": int(self._clock.made)}

    @with_cpu_default
    def __setstate__(self, state: dict[str, Any]) -> None:
        history, made = state.pop("_history", None), state.pop("_made", 0)
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in {**FLAGS, **self.defaults}.items():
                group.setdefault(key, value)
        if history is not None:  # a copy or an unpickled one; load_state_dict keeps its parts
            self._build(made)
            self._in_backward = InBackward(self) if self._one_tensor_a_part else None
            for part, saved in zip(self._parts, history, strict=True):
                part.load(saved, call="GSO.__setstate__(…)")


def _names_of(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's parameters; their places where they have none."""
    return group.get("param_names") or [f"param{j}" for j in range(len(group["params"]))]
