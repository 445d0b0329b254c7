"""Code that runs before and after the step of any optimizer, and marks that keep code out of torch's compiler."""

from __future__ import annotations

import copyreg
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Bypassed",
    "Handle",
    "Place",
    "Turn",
    "Unseen",
    "after_backward",
    "attach_to",
    "constant_while_traced",
    "not_traced",
    "runs_hooks",
    "users_level",
    "without_compiler_guard",
]

Function = TypeVar("Function", bound=Callable[..., Any])


class Handle:
    """Removes what `attach_to` registered; a second removal does nothing."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    @property
    def is_attached(self) -> bool:
        """Whether `remove` has not been called yet."""
        return bool(self._handles)

    def remove(self) -> None:
        """Detach."""
        while self._handles:
            self._handles.pop().remove()


class Turn:
    """Where something is within one step of an optimizer, so that all calls of a closure count as one step.

    Attributes:
        held: what the first call of the closure in this step decided; None outside of a step and before the first.
    """

    def __init__(self) -> None:
        self.held: Any = None
        self._is_open = False
        self._seen: list[tuple[Any, int]] = []
        self._same, self._marks = 0, list[str]()
        self._others: weakref.WeakSet[Turn] = weakref.WeakSet()

    def stand_at(self, optimizer: torch.optim.Optimizer) -> None:
        """Note at which optimizer this is, so that two at one optimizer notice each other."""
        self._others = _TURNS.setdefault(optimizer, weakref.WeakSet())
        self._others.add(self)

    def done_by_another(self, parameters: Sequence[Tensor]) -> bool:
        """Whether another one at the same optimizer has acted on these very gradients."""
        return len(self._others) > 1 and any(one.done(parameters) for one in self._others if one is not self)

    def begin(self) -> None:
        """Note that a step of the optimizer begins."""
        self._is_open, self.held = True, None

    def take(self, decision: Any, parameters: Sequence[Tensor]) -> None:
        """Keep a decision for the rest of the step, and note on which gradients it has acted."""
        if torch.compiler.is_compiling():
            return
        if self._is_open and self.held is None:
            self.held = decision
        self._seen = [(weakref.ref(gradient), gradient._version) for gradient in _ends(parameters)]
        self._marks = [_mark(gradient) for gradient in _ends(parameters)] if self._same else []

    def done(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these very gradients have been acted on: nobody has written to them since."""
        now = _ends(parameters)
        return (
            bool(now)
            and len(now) == len(self._seen)
            and all(
                ref() is gradient and version == gradient._version
                for gradient, (ref, version) in zip(now, self._seen, strict=True)
            )
        )

    def stands_still(self, parameters: Sequence[Tensor]) -> bool:
        """Whether this is the third time outside of a step that the gradients are those of the time before.

        On a CPU their numbers are compared too, since a write through ``.data`` leaves no mark.
        """
        if self._is_open or not self.done(parameters):
            self._same = 0
            return False
        written = self._same > 0 and self._marks != [_mark(gradient) for gradient in _ends(parameters)]
        self._same = 1 if written else self._same + 1
        return self._same == Unseen.STEPS

    def end(self) -> None:
        """Note that the step is over."""
        self._is_open, self.held, self._seen = False, None, []


def _ends(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The first and the last gradient there is."""
    ends: list[Tensor] = []
    for order in (parameters, reversed(parameters)):
        ends += next(([p.grad] for p in order if p.grad is not None), [])
    return ends


_TURNS: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakSet[Turn]] = weakref.WeakKeyDictionary()
_TAKEN: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = weakref.WeakKeyDictionary()


class Place:
    """The place of one splitter at an optimizer; `remove` leaves it.

    Args:
        optimizer: at which to stand.
        owner: what stands there; not kept alive.
        names, parameters: what it bounds.
        call: the caller's name, for errors.

    Raises:
        ValueError: something else stands there for one of the parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        owner: Any,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        *,
        call: str,
    ) -> None:
        places = _TAKEN.setdefault(optimizer, [])
        places[:] = [place for place in places if place.owner() is not None]
        mine = {id(p): name for name, p in zip(names, parameters, strict=True)}
        for place in places:
            both = [name for key, name in mine.items() if key in place.keys]
            if both:
                raise ValueError(
                    f"{call}({type(optimizer).__name__}): expected one splitter per parameter, got a second one for "
                    f"{both[0]!r} and {len(both) - 1} more. Call remove() on the first one's handle, or give several "
                    "budgets to one splitter."
                )
        self.owner, self.keys, self._places, self.told = weakref.ref(owner), set(mine), places, False
        places.append(self)
        # What copy and pickle ask first; an answer that somebody else has given stays.
        copyreg.dispatch_table.setdefault(type(optimizer), _reduced)

    def remove(self) -> None:
        """Leave the place."""
        if self in self._places:
            self._places.remove(self)


def _reduced(optimizer: torch.optim.Optimizer) -> Any:
    """What a copy or a pickle of an optimizer is made of: as without us, and a word where something is left behind.

    Warns:
        UserWarning: something stands at the optimizer, since torch's optimizers leave their hooks behind.
    """
    for place in _TAKEN.get(optimizer, ()):
        owner, name = type(place.owner()).__name__, type(optimizer).__name__
        if place.owner() is None or place.told:
            continue
        place.told = True
        warnings.warn(
            f"copy or pickle of {name}: the {owner} that is attached to it stays behind, and nothing bounds the steps "
            f"of the copy. If the copy trains, make a {owner} for its model, attach it to the copy, and call "
            "load_state_dict(splitter.state_dict()). To save a run, save state_dict() of each.",
            UserWarning,
            stacklevel=users_level(),
        )
    return optimizer.__reduce_ex__(2)


_STEP = torch.optim.Optimizer.profile_hook_step(len).__code__
"""What torch puts around the step of every optimizer."""


class Unseen:
    """Warns once where an optimizer makes steps that something at it never sees.

    A hook after the step counts, until `settle` takes it away; then no step costs anything.

    Args:
        optimizer: whose steps are counted.
        owner: what should see them; not kept alive.
        call, remedy: the caller's name and what to write, for the message.

    >>> weight = torch.zeros(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([weight])
    >>> unseen = Unseen(optimizer, weight, call="Splitter", remedy="Call step().")
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     for _ in range(9):
    ...         optimizer.step()
    >>> [str(one.message) for one in told]
    ['Splitter(optimizer=SGD): SGD made 3 steps and none of them was bounded. Call step().']
    """

    STEPS = 3

    def __init__(self, optimizer: torch.optim.Optimizer, owner: Any, *, call: str, remedy: str) -> None:
        self._count, self._says = 0, f"{call}(optimizer={type(optimizer).__name__})"
        self._remedy, self._owner, self._was_read = remedy, weakref.ref(owner), False
        self._turn = Turn()
        self._hook: Any = optimizer.register_step_post_hook(self._look)

    def read(self) -> None:
        """Note that the owner was asked for words, and may have been made for these alone."""
        self._was_read = True

    def came_too_late(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the optimizer has made a step with these very gradients before anything was done to them."""
        return self._turn.done(parameters)

    def settle(self) -> bool:
        """Take the hook away, since a step was seen or will be; return whether that is done.

        Within a step of an optimizer torch goes through its hooks, so they must stay. Then the hook only falls silent.
        """
        self._count = self.STEPS
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code is not _STEP:
            frame = frame.f_back
        if frame.f_code is not _STEP:
            self._hook.remove()
        return frame.f_code is not _STEP

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._count >= self.STEPS:
            return
        self._count += 1
        self._turn.take(None, [p for group in optimizer.param_groups for p in group["params"]])
        if self._count < self.STEPS or (self._was_read and self._owner() is None):
            return
        warnings.warn(
            f"{self._says}: {type(optimizer).__name__} made {self._count} steps and none of them was bounded. "
            f"{self._remedy}",
            UserWarning,
            stacklevel=3,
        )


class Bypassed:
    """Warns once where weights change from one backward pass to the next and an optimizer's hooks see no step.

    That is so where ``optimizer.step`` was replaced, or where a copy of the optimizer makes the steps. Writes through
    ``.data`` leave no mark, so on a CPU three numbers of a tensor are compared too. On a device that would wait, and
    such writes are not seen. `remove` ends it, at the first step that is seen.

    Args:
        optimizer: whose hooks see nothing.
        parameters: the first and the last of them are looked at.
        call: the caller's name, for the message.

    >>> weight = torch.zeros(1, requires_grad=True)
    >>> bypassed = Bypassed(torch.optim.SGD([weight]), [weight], call="attach")
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     for _ in range(9):
    ...         weight.sum().backward()
    ...         _ = weight.detach().sub_(weight.grad)
    >>> [str(one.message).split(",")[0] for one in told]
    ['attach(SGD): the weights changed 3 times and no step of SGD was seen']
    """

    TIMES = 3

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], *, call: str) -> None:
        self._name, self._call, self._told = type(optimizer).__name__, call, False
        self._seen: dict[int, tuple[str, int]] = {}  # id -> the mark at the last pass, how often it had changed
        ends = {id(p): p for p in (parameters[0], parameters[-1])}.values()
        look = not_traced(self._look)
        self._hooks = [p.register_post_accumulate_grad_hook(look) for p in ends if p.is_leaf and p.requires_grad]

    def remove(self) -> None:
        """Look no more."""
        while self._hooks:
            self._hooks.pop().remove()

    def _look(self, parameter: Tensor) -> None:
        mark = _mark(parameter)
        last, times = self._seen.get(id(parameter), (mark, 0))
        times += mark != last
        self._seen[id(parameter)] = mark, times
        if times < self.TIMES or self._told:
            return
        self._told = True
        warnings.warn(
            f"{self._call}({self._name}): the weights changed {times} times and no step of {self._name} was seen, so "
            "that nothing was bounded. Its step was replaced, or a copy of it makes the steps. Attach to the optimizer "
            "that makes them, or call splitter.step() before each.",
            UserWarning,
            stacklevel=users_level(),
        )


def _mark(tensor: Tensor) -> str:
    """What changes when somebody writes to a tensor: its version, and on a CPU its first, middle and last number."""
    said = str(tensor._version)
    if tensor.device.type == "cpu" and tensor.numel() and type(tensor) in (Tensor, torch.nn.Parameter):
        for at in (0, 0.5, 1):
            place = tuple(slice(int(at * (n - 1)), int(at * (n - 1)) + 1) for n in tensor.shape)
            said += f" {tensor.detach()[place].tolist()}"
    return said


def after_backward(act: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``act`` when the gradients of a step are complete; a hook before the step calls this.

    Without a closure the gradients are complete when the step begins, and ``act`` runs at once. With a closure (LBFGS,
    Lightning) the backward pass runs inside the step. Then ``act`` runs without gradients at the end of every call of
    the closure.

    Args:
        act: what to do with the complete gradients.
        args: the positional arguments of ``step``, the optimizer first.
        kwargs: its keyword arguments.

    Returns:
        The arguments with the closure replaced, for the hook to return; None without a closure.

    >>> order = []
    >>> (_, closure), _ = after_backward(lambda: order.append("act"), ("sgd", lambda: order.append("backward")), {})
    >>> closure(); order
    ['backward', 'act']
    """
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    if not callable(closure) or isinstance(closure, torch.nn.Module):  # an optimizer's step may take something else
        act()
        return None

    def closure_then_act() -> Any:
        loss = closure()
        with torch.no_grad():
            act()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_then_act}
    return (args[0], closure_then_act, *args[2:]), kwargs


def runs_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer was made as torch makes one, so that its step runs what is registered.

    >>> runs_hooks(torch.optim.SGD([torch.zeros(1)]))
    True
    """
    return "_optimizer_step_post_hooks" in vars(optimizer)


def attach_to(
    optimizer: torch.optim.Optimizer,
    *,
    before: Callable[[], Any],
    after: Callable[[], Any] | None = None,
    start: Callable[[], Any] | None = None,
) -> Handle:
    """Call ``start`` when a step begins, ``before`` when its gradients are complete, and ``after`` when it has updated.

    With a closure ``before`` runs at the end of every call of the closure, as `after_backward` says; ``start`` and
    ``after`` run once.

    Raises:
        TypeError: an optimizer that was made without `torch.optim.Optimizer.__init__`.
    """
    if not runs_hooks(optimizer):
        raise TypeError(
            f"attach({type(optimizer).__name__}): expected an optimizer whose step runs hooks, got one that never "
            "called torch.optim.Optimizer.__init__. Pass the optimizer inside it, or call step() yourself."
        )

    def pre(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if start is not None:
            start()
        return after_backward(before, args, kwargs)

    handles: list[Any] = [optimizer.register_step_pre_hook(pre)]
    if after is not None:
        handles.append(optimizer.register_step_post_hook(lambda *_: after()))
    return Handle(handles)


def not_traced(function: Function) -> Function:
    """Return a function that ``torch.compile`` calls as it is and never takes into a graph.

    ``torch.compiler.disable`` does the same, but it imports the compiler, which takes most of a second. Here a program
    that compiles nothing never imports it. A function that was marked before the import is kept out of graphs too.

    >>> not_traced(len)([1, 2])
    2
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def outside_of_graphs(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    outside_of_graphs._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outside_of_graphs  # type: ignore[return-value]


def users_level() -> int:
    """Return the ``stacklevel`` at which a warning of the caller points at the user's line, beyond torch and gradsplit.

    >>> script = {"__name__": "script", "users_level": users_level}
    >>> exec("level = users_level()", script); script["level"]
    1
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    return level


_NOT_THE_USERS = ("gradsplit", "torch", "copy", "pickle", "multiprocessing", "cloudpickle")


def constant_while_traced(function: Function) -> Function:
    """Mark a function that ``torch.compile`` runs once, while it traces; the graph keeps only the result.

    ``torch.compiler.assume_constant_result`` sets the same mark, but it imports the compiler.

    >>> @constant_while_traced
    ... def answer():
    ...     return 42
    >>> answer()
    42
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def without_compiler_guard(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch's optimizer as it is beneath torch's own guard against the compiler.

    torch wraps ``add_param_group``, ``zero_grad`` and some others, so that its compiler does not trace them. The
    wrapper imports the compiler at the first call, which takes most of a second. Nothing can be traced before
    something else has imported the compiler, so until then the method runs without the wrapper. Other methods are
    returned unchanged: those of a class in between, and those that someone has patched.

    >>> without_compiler_guard(len) is len
    True
    """
    bound: Any = method
    function: Any = getattr(bound, "__func__", None)
    guarded = getattr(function, "__globals__", {}).get("__name__") == "torch._compile"
    if not guarded or "torch._dynamo" in sys.modules:
        return method
    bare: Callable[..., Any] = function.__wrapped__.__get__(bound.__self__)
    return bare
