"""What is patched in torch while a script is watched, so that its losses and its own bound are seen.

- ``Tensor.backward``, ``TermSplitter.backward`` and ``GradScaler.scale``, for the losses: see `Losses`.
- ``GradScaler.step``, for the steps that it does not make: see `watch_scaler`.
- ``torch.nn.utils.clip_grad_norm_``, for the bound that the script sets itself: see `watch_own_bound`.

What backward is called on has a graph. It tells the order of the forward pass, and where a loss was lost that is not
finite (`leaves_in_order`, `lost_in_forward`). torch numbers the operations of a forward pass in their order, and keeps
the tensors that backward will need. No hook is needed for that.

Each of them still does what it did. Nothing else is replaced: a session attaches to optimizers by torch's own
hooks.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from ... import sources

__all__ = [
    "Losses",
    "Lost",
    "kept_by",
    "leaves_in_order",
    "lost_in_forward",
    "own_factor",
    "operations_of",
    "watch_own_bound",
    "watch_scaler",
]

Before = Callable[[list[Tensor]], None]
After = Callable[[list[Tensor], float, Tensor], None]


def watch_own_bound(before: Before, after: After) -> None:
    """Call ``before(parameters)`` and ``after(parameters, max_norm, norm)`` around each ``clip_grad_norm_``.

    The norm is what torch's function returned, see `own_factor`. The script gets the same results as without us.
    """
    original = clip_grad.clip_grad_norm_

    @functools.wraps(original)
    def watched(parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return original(parameters, max_norm, norm_type, *args, **kwargs)
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        before(tensors)
        norm = original(tensors, max_norm, norm_type, *args, **kwargs)
        after(tensors, max_norm, norm)
        return norm

    clip_grad.clip_grad_norm_ = watched
    torch.nn.utils.clip_grad_norm_ = watched


def own_factor(max_norm: float, norm: Tensor) -> Tensor:
    """Return by what ``clip_grad_norm_`` scaled all gradients, ``min(1, max_norm / (norm + 1e-6))``, as a tensor.

    It is nan where the norm was not finite, because torch's function then spreads nan to every gradient.
    """
    norm = norm.detach()
    factor = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norm), factor, torch.full_like(factor, float("nan")))


def watch_scaler(before: Callable[[Any], int], after: Callable[[Any, int], None]) -> None:
    """Call ``mark = before(optimizer)`` and ``after(optimizer, mark)`` around each ``GradScaler.step``."""
    step = torch.amp.GradScaler.step

    @functools.wraps(step)
    def seen_step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        mark = before(optimizer)
        made = step(scaler, optimizer, *args, **kwargs)
        after(optimizer, mark)
        return made

    setattr(torch.amp.GradScaler, "step", seen_step)  # noqa: B010 - a method of another class


class Losses:
    """The sum of all scalars that backward was called on since the last step: the one whose gradient the step uses.

    A loss multiplied by a gradient scaler is seen as it was before, and the terms of a `TermSplitter` as their weighted
    sum. Tensors stay on their device.

    Attributes:
        before: called with what backward is called on, and its value without a scaler's factor (None: no scalar).
        after: called when a backward pass is done.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._last: Tensor | float = float("nan")
        self._unscaled: tuple[weakref.ref[Tensor], Tensor] | None = None
        self._newest: Tensor | None = None
        self._earlier: Tensor | None = None
        self.before: list[Callable[[Tensor, Tensor | None], None]] = []
        self.after: list[Callable[[], None]] = []

    def take(self) -> Tensor | float:
        """Return the sum and start anew; a second optimizer that steps on the same backward gets it again."""
        if self._sum is not None:
            self._last, self._sum = self._sum, None
        return self._last

    def take_before(self) -> Tensor | float:
        """Return the sum without the scalar that was noted last, which is kept for the next step."""
        if self._newest is None:
            return self.take()
        newest, earlier = self._newest, self._earlier
        self._newest, self._earlier, self._sum = None, None, newest
        self._last = earlier if earlier is not None else float("nan")
        return self._last

    def note(self, loss: Tensor) -> Tensor | None:
        """Add a scalar that backward is called on, and return its value without a scaler's factor; None: no scalar."""
        if loss.numel() != 1 or not (loss.is_floating_point() or loss.is_complex()):
            return None
        if self._unscaled is not None and self._unscaled[0]() is loss:
            value = self._unscaled[1]
        else:
            value = loss.detach().reshape(()).clone()
        if type(value) is not Tensor:  # a DTensor's sum would be a collective
            value = value.to_local() if hasattr(value, "to_local") else value.as_subclass(Tensor)
        self._earlier, self._newest = self._sum, value
        same = self._sum is not None and self._sum.device == value.device
        self._sum = self._sum + value if same and self._sum is not None else value
        return value

    def note_scaled(self, outputs: Any, scaled: Any) -> None:
        """Remember what a gradient scaler multiplied."""
        if isinstance(outputs, Tensor) and isinstance(scaled, Tensor) and outputs.numel() == 1:
            self._unscaled = (weakref.ref(scaled), outputs.detach().reshape(()).clone())

    def install(self) -> None:
        """Look at every backward pass and every ``GradScaler.scale`` from now on; all do what they did."""
        backward, scale, split = Tensor.backward, torch.amp.GradScaler.scale, sources.TermSplitter.backward

        def around(loss: Tensor, act: Callable[[], Any]) -> Any:
            value: Tensor | None = None
            with contextlib.suppress(Exception):  # a tensor of a class of its own may refuse anything
                value = self.note(loss)
            for begin in self.before:
                begin(loss, value)
            made = act()
            for tell in self.after:
                tell()
            return made

        @functools.wraps(backward)
        def seen_backward(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return backward(tensor, *args, **kwargs)
            return around(tensor, lambda: backward(tensor, *args, **kwargs))

        @functools.wraps(split)
        def seen_terms(splitter: sources.TermSplitter, *unnamed: Any, **terms: Tensor) -> Any:
            total: Any = None
            with contextlib.suppress(Exception):  # what is no term is refused by the splitter itself
                total = sum(splitter.weights.get(name, 1.0) * term for name, term in terms.items())
            if torch.compiler.is_compiling() or not isinstance(total, Tensor):
                return split(splitter, *unnamed, **terms)
            return around(total, lambda: split(splitter, *unnamed, **terms))

        @functools.wraps(scale)
        def seen_scale(scaler: Any, outputs: Any) -> Any:
            scaled = scale(scaler, outputs)
            with contextlib.suppress(Exception):
                self.note_scaled(outputs, scaled)
            return scaled

        for owner, name, seen in (
            (Tensor, "backward", seen_backward),
            (sources.TermSplitter, "backward", seen_terms),
            (torch.amp.GradScaler, "scale", seen_scale),
        ):
            setattr(owner, name, seen)


_MOST = 200_000  # operations looked at: a larger graph is left alone


class Lost(dict[str, Any]):
    """Where a forward pass lost its finite values, as plain data: kind, where and operation.

    kind: "weights" (they were not finite already), "input" (the batch), "forward" (an operation after the parameter
    ``where``), or "loss" (above every parameter, as far as can be seen).
    """


def operations_of(loss: Tensor) -> Iterator[Any]:
    """Yield the nodes of a graph, each once; a graph that is too large is left after some of them."""
    start = loss.grad_fn
    seen, waiting = ({start} if start is not None else set()), [start] if start is not None else []
    while waiting and len(seen) <= _MOST:
        node = waiting.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)


def _uses(loss: Tensor) -> list[tuple[int, Tensor]]:
    """Pairs (number of the first operation that reads it, leaf), in the order of the forward pass."""
    first: dict[int, tuple[int, Tensor]] = {}
    for node in operations_of(loss):
        number = int(node._sequence_nr())
        for below, _ in node.next_functions:
            leaf = getattr(below, "variable", None)
            if isinstance(leaf, Tensor):
                known = first.get(id(leaf))
                if known is None or number < known[0]:
                    first[id(leaf)] = (number, leaf)
    return sorted(first.values(), key=lambda pair: pair[0])


def leaves_in_order(loss: Tensor) -> list[Tensor]:
    """Return the tensors that backward will give gradients to, in the order in which the forward pass read them.

    >>> w, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> [leaf is w for leaf in leaves_in_order(((w * 2) + b).sum())]
    [True, False]
    """
    return [leaf for _, leaf in _uses(loss)]


def lost_in_forward(loss: Tensor, names: Mapping[int, str]) -> Lost:
    """Return where a forward pass lost its finite values, by what its graph has kept.

    Args:
        loss: a scalar that is not finite, before backward has been called on it.
        names: id(parameter) -> name.
    """
    uses = _uses(loss)
    shown = [(number, names.get(id(leaf), ""), leaf) for number, leaf in uses]
    spoilt = next(((number, name) for number, name, leaf in shown if name and not _finite(leaf)), None)
    found: list[tuple[int, Any, bool, bool]] = []  # number, operation, whether it was given the value, and as data
    for node in operations_of(loss):
        number = int(node._sequence_nr())
        if number < 1 << 62:
            spoilt_names = [name for name, kept in kept_by(node).items() if not _finite(kept)]
            if spoilt_names:
                given = [name for name in spoilt_names if "result" not in name and "output" not in name]
                as_data = (
                    bool(given) and len(given) == len(spoilt_names) and all(_is_data(node, name) for name in given)
                )
                found.append((number, node, bool(given), as_data))
    bad = _first_made(sorted(found, key=lambda one: one[0]))
    if spoilt is not None and (bad is None or spoilt[0] <= bad[0]):
        return Lost(kind="weights", where=spoilt[1], operation="")
    if bad is None:
        return Lost(kind="loss", where="", operation=loss.grad_fn.name() if loss.grad_fn is not None else "")
    number, node, takes, _ = bad
    operation = node.name().rstrip("0123456789").removesuffix("Backward")
    # An operation that was given a bad value comes after what made it; one that made it stands where it is.
    own = {names.get(leaf, "").rpartition(".")[0] for leaf in _read_by(node)} if takes else set()
    below = {id(getattr(one, "variable", None)) for one in _below(node)}
    above = [
        name
        for place, name, leaf in shown
        if name and place <= number and id(leaf) in below and name.rpartition(".")[0] not in own
    ]
    if above:
        return Lost(kind="forward", where=above[-1], operation=operation)
    return Lost(kind="input", where=next((name for _, name, _ in shown if name), ""), operation=operation)


def _first_made(found: list[tuple[int, Any, bool, bool]]) -> tuple[int, Any, bool, bool] | None:
    """The first operation with a lost value; one that was given it as data only where nothing else made one.

    Data may be what another part of the same graph made: an advantage is made from a value without its gradient.
    """
    data = {one[1] for one in found if one[3]}
    for one in found:
        if not one[3] and not data & _below(one[1]):
            return one
    return found[0] if found else None


def _below(node: Any) -> set[Any]:
    """The operation and all that lie between it and the leaves."""
    seen, waiting = {node}, [node]
    while waiting and len(seen) <= _MOST:
        for below, _ in waiting.pop().next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
    return seen


def _is_data(node: Any, name: str) -> bool:
    """Whether what an operation has kept needs no gradient."""
    try:
        kept = getattr(node, f"_saved_{name}")
    except (AttributeError, RuntimeError):
        return False
    return isinstance(kept, Tensor) and not kept.requires_grad


def _read_by(node: Any) -> set[int]:
    """The leaves, by id, that an operation reads itself or through a view."""
    found: set[int] = set()
    for below, _ in node.next_functions:
        for one, _ in ((below, 0), *(below.next_functions if below is not None else ())):
            if isinstance(getattr(one, "variable", None), Tensor):
                found.add(id(one.variable))
    return found


def kept_by(node: Any) -> dict[str, Tensor]:
    """Return the tensors that an operation keeps for backward; those behind hooks (checkpointing) are left alone.

    To ask for those would compute a part of the forward pass again.
    """
    found: dict[str, Tensor] = {}
    for name in _places_of(type(node)):
        saved = getattr(node, name, None)
        for at, one in enumerate(saved if isinstance(saved, (list, tuple)) else [saved]):
            try:
                if one is not None and getattr(one, "unpack_hook", 0) is None and isinstance(one.data, Tensor):
                    found[name.removeprefix("_raw_saved_") + (str(at) if at else "")] = one.data
            except RuntimeError:  # an empty place
                continue
    return found


_PLACES: dict[Any, tuple[str, ...]] = {}


def _places_of(operation: Any) -> tuple[str, ...]:
    """Where an operation keeps tensors; all nodes of one operation have the same places."""
    if operation not in _PLACES:
        if len(_PLACES) > 1000:  # a script may make classes for ever
            _PLACES.clear()
        _PLACES[operation] = tuple(name for name in dir(operation) if name.startswith("_raw_saved_"))
    return _PLACES[operation]


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout != torch.strided or tensor.is_meta:
        return True
    with torch.no_grad():
        return bool(torch.isfinite(tensor.detach().sum())) or bool(torch.isfinite(tensor.detach()).all())
