"""The parts of a GSO: parameters under one plan, their moments, and one step of them."""

from __future__ import annotations

import ctypes
import importlib
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..amp import Scaling
from ..collective import Collective
from ..distributed import is_sharded, local_of
from ..hooks import users_level
from ..plan import Layout, Plan, make_plan, one_device, part_of
from ..rates import Clock
from ..series import Series
from ..split import Split, StepRecord
from .directions import DIRECTIONS
from .kinds import Kind
from .share import ShareUpdate
from .updates import Update, make_update, refusal_of_fused

__all__ = [
    "Part",
    "make_memories",
    "make_parts",
    "memory_dtype",
    "real",
    "seen",
    "step_part",
]

_CALL = "GSO"

_Shared = tuple[Collective, Clock, Series]


@dataclass
class Part:
    """Parameters of one optimizer under one plan.

    Attributes:
        split: their plan, budgets and rates.
        groups: the position of each parameter's group in the optimizer.
        update: makes a step of them.
        kinds: what each parameter is to the share step; None: they are updated as by AdamW.
        dtypes: of the parameters at the last step; None before the first.
        places: the shape and the device of each parameter, which stay.
    """

    split: Split
    groups: list[int]
    update: Update
    kinds: list[Kind] | None = None
    dtypes: list[torch.dtype] | None = None
    places: list[tuple[torch.Size, torch.device]] = field(init=False)

    def __post_init__(self) -> None:
        self.places = [(owner.shape, owner.device) for owner in self.split.owners]

    def check_places(self) -> None:
        """Refuse parameters of another shape or device, before compiled code reads memory that is not theirs.

        Raises:
            ValueError: a parameter was given other data since GSO was made; names it.
        """
        places = [(owner.shape, owner.device) for owner in self.split.owners]
        if places == self.places:
            return
        t = next(t for t, place in enumerate(places) if place != self.places[t])
        (shape, device), (before, at) = places[t], self.places[t]
        was, now = (tuple(before), tuple(shape)) if shape != before else (at, device)
        raise ValueError(
            f"GSO.step(): expected {self.split.plan.layout.names[t]!r} as it was when GSO was made, {was}, got {now}. "
            "Make a new GSO after a parameter changes its shape or its device."
        )

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on and no parameter holds."""
        saved = {**self.split.state(), "groups": sorted(set(self.groups))}
        return {**saved, "share": self.update.state()} if isinstance(self.update, ShareUpdate) else saved

    def load(self, state: Mapping[str, Any], *, call: str) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: the state of another plan, or of other budgets.
        """
        self.split.load(dict(state), call=call)
        if isinstance(self.update, ShareUpdate) and "share" in state:
            self.update.load(state["share"], call=call)

    def record(self, step: int) -> StepRecord | None:
        """Return the record of the last step, numbered ``step``; None before the first."""
        if isinstance(self.update, ShareUpdate):
            return self.update.record(step)
        decision = self.update.decision
        if decision is None:
            return None
        squares_B = torch.where(decision.finite_B, decision.norm_B.square(), torch.nan)
        return StepRecord(step, squares_B, decision)

    def look_again(self) -> None:
        """See the parameters as they lie in memory now: ``.data`` of one may have been replaced, or the model cast."""
        for t, (owner, tensor) in enumerate(zip(self.split.owners, self.split.tensors, strict=True)):
            if tensor is not owner and tensor.data_ptr() != owner.data_ptr():
                kind = None if self.kinds is None else self.kinds[t]
                self.split.tensors[t] = seen(self.split.plan.layout.names[t], owner, kind)


def make_parts(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[int],
    options: Mapping[str, Any],
    kinds: Sequence[Kind] | None,
    collective: Collective,
    clock: Clock,
    series: Series,
    *,
    one_tensor_each: bool,
) -> list[Part]:
    """Return some groups under one plan; no part where they hold no elements.

    Args:
        optimizer: read for learning rates at every step.
        groups: their positions.
        options: ``second_moment`` and ``fused`` as in `GSO`, the others as in `Split`.
        kinds: one per parameter for the share step; None: updates as by AdamW.
        collective: shared by all parts.
        clock: likewise.
        series: likewise.
        one_tensor_each: one part per tensor, for updates inside backward.

    Raises:
        ValueError: bins over several tensors where each needs one; no compiled update with ``fused=True``.
    """
    names: list[str] = []
    owners: list[Tensor] = []
    positions: list[int] = []
    for i in groups:
        group = optimizer.param_groups[i]
        names += group.get("param_names") or [f"group{i}.param{j}" for j in range(len(group["params"]))]
        owners += group["params"]
        positions += [i] * len(group["params"])
    # torch lets groups repeat each other's names; a layout's are unique.
    counts = Counter(names)
    names = [f"group{i}.{name}" if counts[name] > 1 else name for i, name in zip(positions, names, strict=True)]
    if not any(owner.numel() for owner in owners):
        return []
    held = None if kinds is None else list(kinds)
    plan = options["plan"]
    if isinstance(plan, Plan):  # one of what was trainable when it was made, as `layout_of` gives it
        kept = [t for t, p in enumerate(owners) if p.requires_grad or names[t] in plan.layout.names]
        names, positions = [names[t] for t in kept], [positions[t] for t in kept]
        owners, held = [owners[t] for t in kept], None if held is None else [held[t] for t in kept]
    shared = collective, clock, series
    part = _make_part(optimizer, names, owners, positions, options, held, shared)
    return _one_by_one(part, shared) if one_tensor_each else [part]


def _make_part(
    optimizer: torch.optim.Optimizer,
    names: list[str],
    owners: list[Tensor],
    positions: list[int],
    options: Mapping[str, Any],
    kinds: list[Kind] | None,
    shared: _Shared,
) -> Part:
    more = dict(options)
    second_moment, fused = more.pop("second_moment"), more.pop("fused")
    one_device(list(zip(names, owners, strict=True)), call=_CALL)
    tensors = [
        seen(name, p, None if kinds is None else kinds[t])
        for t, (name, p) in enumerate(zip(names, owners, strict=True))
    ]
    forms = [form_of(p, None if kinds is None else kinds[t]) for t, p in enumerate(owners)]
    layout = Layout(tuple(names), tuple(forms))
    plan = make_plan(more.pop("plan"), layout, call=_CALL)
    split = Split(plan, tensors, more.pop("budget"), owners=owners, caps_updates=True, call=_CALL, **more)
    split.read_rates(optimizer)
    if (second_moment == "bin" or kinds is not None) and not split.bins_in_one_tensor:
        said, remedy = (
            ("second_moment='bin'", "second_moment='element'") if kinds is None else ("plan=…", "direction='adam'")
        )
        raise ValueError(
            f"GSO({said}): expected bins inside one tensor each, got {plan!r} with bins over several. Use a plan by "
            f"rows or tensors, or {remedy}."
        )
    if kinds is not None and split.update_budgets:
        raise ValueError(
            f"GSO(budget=…): expected budgets of gradients, got {split.update_budgets[0][1]!r}, which bounds the "
            "update: here every row moves by its share. Leave it out, or use direction='adam'."
        )
    return Part(split, positions, _update(split, kinds, shared, fused), kinds)


_COMPILED = {"numba": (".updates.share_numba", "CompiledShare"), "triton": (".updates.share_triton", "TritonShare")}
"""Backend -> module and class of the share step; by the definition where there is none."""


def _update(split: Split, kinds: list[Kind] | None, shared: _Shared, fused: bool | None) -> Update:
    if kinds is None:
        return make_update(split, fused=fused)
    place = _COMPILED.get(split.kernel.name) if fused is not False else None
    if fused and place is None and split.kernel.device.type != "meta":  # there a step says so
        raise RuntimeError(refusal_of_fused(split))
    made = ShareUpdate if place is None else getattr(importlib.import_module(place[0], __package__), place[1])
    update: ShareUpdate = made(split, kinds, *shared)
    return update


def _one_by_one(part: Part, shared: _Shared) -> list[Part]:
    """Return one part per tensor, for updates that see one tensor at a time."""
    split, parts = part.split, []
    check_budget(split)
    for t, numel in enumerate(split.plan.layout.numels):
        if not numel:  # of the whole tensor: a rank without a piece still takes part
            continue
        one, kinds = split.of_one(t, part_of(split.plan, [t])[0]), None if part.kinds is None else [part.kinds[t]]
        parts.append(Part(one, [part.groups[t]], _update(one, kinds, shared, None), kinds))
    return parts


def form_of(tensor: Tensor, kind: Kind | None) -> tuple[int, ...]:
    """Return the shape as which a split sees a parameter, whole or sharded: experts by rows, complex numbers as pairs.

    >>> form_of(torch.zeros(2, 3, 4), Kind("matrix", "orthogonal", rows=6, cols=4))
    (6, 4)
    >>> form_of(torch.zeros(3, dtype=torch.complex64), Kind("vector", "adam", rows=1, cols=3))
    (6,)
    """
    shape, pair = tuple(int(size) for size in tensor.shape), (2,) if tensor.is_complex() else ()
    if kind is not None and tensor.dim() == 1:
        return (math.prod(shape + pair),)  # a complex vector is one row
    if kind is None or tensor.dim() < 3 or kind.rows == shape[0]:
        return shape + pair
    return (kind.rows, kind.cols, *pair)


def seen(name: str, tensor: Tensor, kind: Kind | None) -> Tensor:
    """Return a parameter as its split sees it, in the form of `form_of`, sharing memory; a sharded one as it is.

    Raises:
        ValueError: the memory of a tensor cannot be seen in that form.

    >>> seen("experts", torch.zeros(2, 3, 4), Kind("matrix", "orthogonal", rows=6, cols=4)).shape
    torch.Size([6, 4])
    """
    if is_sharded(tensor):
        return tensor
    plain, form = real(tensor), form_of(tensor, kind)
    try:
        return plain if plain.shape == form else plain.view(form)
    except RuntimeError:
        raise ValueError(
            f"GSO(…): expected memory that can be seen as {form[0]} rows of {form[1]}, got {name!r} of shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()}. Make the parameter contiguous()."
        ) from None


def real(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones, sharing memory; anything else as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def memory_dtype(owner: Tensor, *, by_share: bool) -> torch.dtype:
    """Return the dtype of what is remembered of a parameter: its own, and for the share step at least float32.

    >>> memory_dtype(torch.zeros(1, dtype=torch.bfloat16), by_share=True)
    torch.float32
    """
    return torch.float32 if by_share and owner.dtype in (torch.float16, torch.bfloat16) else owner.dtype


def _follow_casts(optimizer: torch.optim.Optimizer, part: Part) -> None:
    """Cast the memories of parameters that were cast since the last step, as ``model.double()`` does it."""
    owners, by_share = part.split.owners, part.kinds is not None
    dtypes = [owner.dtype for owner in owners]
    if part.dtypes is not None and part.dtypes != dtypes:
        for owner in owners:
            state, dtype = optimizer.state.get(owner, {}), memory_dtype(owner, by_share=by_share)
            for key in {"momentum", "exp_avg", "exp_avg_sq"} & set(state):
                state[key] = state[key].to(dtype)
    part.dtypes = dtypes


def new_memory(owner: Tensor, kind: Kind | None, num_bins: int | None, *, capturable: bool) -> dict[str, Tensor]:
    """Return zeros for a parameter that has its first gradient.

    Args:
        owner: the parameter.
        kind: what it is to the share step, whose direction says what is remembered; None: Adam's two moments.
        num_bins: bins that share one second moment each; None: one per element.
        capturable: the counter lives beside the parameter; else on the CPU, where reading it waits for nothing.
    """
    state = {"step": torch.zeros((), dtype=torch.float32, device=owner.device if capturable else "cpu")}
    if kind is not None:
        wide = memory_dtype(owner, by_share=True)
        for name in DIRECTIONS[kind.direction].memory:
            state[name] = torch.zeros_like(owner, dtype=wide, memory_format=torch.contiguous_format)
        return state
    state["exp_avg"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    if num_bins is None:
        state["exp_avg_sq"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    else:
        state["bin_sq"] = torch.zeros(num_bins, dtype=torch.float32, device=owner.device)
    return state


def advance(states: Sequence[dict[str, Tensor]], found_inf: Tensor | None, by: float = 1.0) -> None:
    """Count a step of every state, or take one back; not where a GradScaler found an overflow, without waiting."""
    if found_inf is None:
        steps = [state["step"] for state in states]
        if not torch.compiler.is_compiling() and all(_is_number(step) for step in steps):
            for step in steps:  # torch's own way takes several times as long: each is an operator call
                ctypes.c_float.from_address(step.data_ptr()).value += by
            torch.autograd.graph.increment_version(steps)
        elif steps:
            torch._foreach_add_(steps, by)
        return
    for state in states:
        if state["step"].device != found_inf.device:
            state["step"] = state["step"].to(found_inf.device)
        state["step"] += by * (found_inf.reshape(()) <= 0).to(state["step"].dtype)


def _is_number(step: Tensor) -> bool:
    """Whether a counter is one float32 in the CPU's memory."""
    return type(step) is Tensor and step.is_cpu and step.dtype is torch.float32 and step.numel() == 1


def local_memory(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return a parameter's state as real views of what this rank holds."""
    if all(type(v) is Tensor and not v.is_complex() for v in state.values()):  # nearly always: each is its own view
        return state
    return {k: real(local_of(v)) for k, v in state.items()}


def local_gradient(owner: Tensor) -> Tensor | None:
    """Return a real view of what this rank holds of a parameter's gradient, if it has one.

    Raises:
        RuntimeError: a sparse gradient.
    """
    gradient = owner.grad
    if gradient is None:
        return None
    if type(gradient) is Tensor and gradient.layout is torch.strided and not gradient.is_complex():  # nearly always
        return gradient.resolve_neg()
    if gradient.is_sparse:
        raise RuntimeError(
            f"GSO does not support sparse gradients, got one of shape {tuple(owner.shape)}. Make the embedding with "
            "sparse=False, or put GradientSplitter in front of SparseAdam."
        )
    local: Tensor = local_of(gradient)
    return real(local.resolve_conj() if local.is_complex() else local)  # autograd leaves conjugates to be worked out


def make_memories(optimizer: torch.optim.Optimizer, part: Part, second_moment: str) -> None:
    """Make the memory of every parameter that has its first gradient.

    Raises:
        RuntimeError: a sparse gradient; nothing has been made then.
        ValueError: a parameter of another shape, or on another device.
    """
    part.check_places()
    split = part.split
    new = [
        t
        for t, owner in enumerate(split.owners)
        if owner.grad is not None and "step" not in optimizer.state.get(owner, ())
    ]
    for t in new:
        local_gradient(split.owners[t])
    for t in new:
        num_bins = len(split.bins_of_tensor[t]) if second_moment == "bin" else None
        capturable = optimizer.param_groups[part.groups[t]]["capturable"]
        kind = None if part.kinds is None else part.kinds[t]
        memory = new_memory(split.owners[t], kind, num_bins, capturable=capturable)
        for name, value in memory.items():  # an optimizer around this one may keep something of its own here
            optimizer.state[split.owners[t]].setdefault(name, value)


def step_part(optimizer: torch.optim.Optimizer, part: Part, scaling: Scaling | None, *, alone: bool) -> None:
    """Update one part.

    Args:
        optimizer: whose states and groups these are.
        part: what is updated.
        scaling: what a GradScaler says of the gradients.
        alone: no other rank takes part in this step.

    Raises:
        RuntimeError: a sparse gradient, or ``fused=True`` without memory to walk.
    """
    split = part.split
    part.look_again()
    gradients = [local_gradient(owner) for owner in split.owners]
    # Where ranks hold shards, one without gradients takes part all the same, or the others would wait for it.
    if alone and all(gradient is None for gradient in gradients):
        if split.kernel.device.type == "meta":
            warnings.warn(
                f"GSO.step(): {split.plan.layout.names[0]!r} and others lie on the meta device and have no gradient, "
                "so nothing moves. to_empty() replaces parameters: make GSO after it.",
                UserWarning,
                stacklevel=users_level(),
            )
        return
    groups = [optimizer.param_groups[i] for i in part.groups]
    if not torch.compiler.is_compiling():
        _follow_casts(optimizer, part)
    if split.kernel.device.type == "meta" and any(group["fused"] for group in groups):
        raise RuntimeError(refusal_of_fused(split))
    own = [
        {} if gradient is None else optimizer.state[owner]
        for owner, gradient in zip(split.owners, gradients, strict=True)
    ]
    found_inf = None if scaling is None else scaling.found_inf
    advance([state for state in own if state], found_inf)
    states: list[dict[str, Any]] = [local_memory(state) if state else state for state in own]
    try:
        part.update.step(gradients, states, groups, scaling)
    except Exception:  # a direction from outside that does not fit: nothing has moved, and no step is counted
        advance([state for state in own if state], found_inf, by=-1.0)
        raise


def check_budget(split: Split) -> None:
    """Refuse budgets that need other tensors' gradients of the same step.

    Raises:
        ValueError: a limit above the tensors, or a bin over several tensors.
    """
    above = [(level, b) for level, b in split.gradient_budgets + split.update_budgets if level in ("root", "module")]
    if above:
        level, budget = above[0]
        raise ValueError(
            f"GSO(in_backward=True): expected budgets of bins or tensors, got {budget!r} at level {level!r}, which "
            "needs the gradients of all its tensors at once; here each is freed before the next is there. Use "
            "in_backward=False, or a budget per bin."
        )
    if not split.bins_in_one_tensor:
        raise ValueError(
            f"GSO(in_backward=True): expected bins inside one tensor each, got {split.plan!r} with bins over several."
            " Use a plan by rows or tensors, or in_backward=False."
        )
