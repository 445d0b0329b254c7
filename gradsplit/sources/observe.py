"""SampleWatch: how much each sample adds to the gradient of each layer, measured beside a training that stays as it is.

    n_i = ||a_i|| ||d_i||        a: the layer's input, d: the signal at its output; sample i of the batch

The norms stay on their device, those of the last passes alone. They are read when somebody asks for a step; `standing`
says who stood out.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

from .ends import WHOLE, WholeKind, rows_at
from .layers import KINDS, LayerKind
from .limits import length, row_shape
from .standing import FAR, RECENT, Reading, Seen, standing_out, upper

__all__ = ["SampleWatch"]

MOST_PASSES, MOST_BYTES, MOST_LAYERS = 512, 64 << 20, 256
_PLAIN = (Tensor, nn.Parameter)


@dataclass
class _Met:
    """A module that has run, and how its samples lie."""

    module: weakref.ref[nn.Module]
    kind: LayerKind | WholeKind | None
    place: int  # in the forward pass that met it first; a recomputation of activations runs in another order
    compiled: bool = False
    keys: tuple[int, ...] = ()  # ids of its parameters as the optimizer knows them; the module may be gone when asked

    def learn(self) -> None:
        """Note the parameters."""
        module = self.module()
        if module is not None and self.kind is not None:
            self.keys = tuple(id(parameter) for parameter in module.parameters())


class _Entry(NamedTuple):
    met: _Met
    activation_S: Tensor | None
    signal_S: Tensor


@dataclass
class _Pass:
    number: int
    task: int
    entries: list[_Entry] = field(default_factory=list)
    num_bytes: int = 0


_WATCHES: list[SampleWatch] = []
_HOOK: list[Any] = []


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Torch's own hook for all modules; in a graph that is being compiled it leaves nothing behind."""
    if torch.compiler.is_compiling():
        return
    for watch in _WATCHES:
        watch.see(module, args, kwargs, output)


def _any_other_hook() -> bool:
    """Torch warns of hooks for all modules when a compiled module runs: this one knows of compiled modules."""
    tables = (
        torch_module._global_backward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
    )
    return any(hook is not _after_forward for table in tables for hook in table.values())


class SampleWatch:
    """See how much each sample adds to the gradient of each layer; the training stays as it is, bit for bit.

        n_i = ||a_i|| ||d_i||      the norm of the layer's input for sample i, times that of the signal at its output

    The rules know Linear, Conv1d to Conv3d, Embedding, LayerNorm, RMSNorm, RNN, GRU, LSTM and MultiheadAttention, and
    their heirs; a module that ``torch.compile`` returned is one layer. What is called inside a compiled graph is not
    seen. Nothing is attached to the model: it can be copied, pickled and scripted as ever.

    Args:
        model: whose layers; None: all that run.
        batch_dim: the dimension of the samples in the inputs of layers. None: 0, and 1 once a recurrent net or an
            attention without ``batch_first`` has run.

    Raises:
        ValueError: something else than a module, or a dimension below 0.

    >>> model, x = nn.Linear(2, 1), torch.ones(8, 2)
    >>> x[5] = float("nan")
    >>> with SampleWatch(model) as watch:
    ...     model(x).sum().backward()
    >>> [(row.sample, row.layer) for row in watch.read_last().rows]
    [(5, '(model)')]

    Source: the project's own; the norm is the upper bound of Goodfellow 2015 that `SampleSplitter` uses.
    """

    def __init__(self, model: nn.Module | None = None, *, batch_dim: int | None = None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"SampleWatch({model!r}): expected the model that is trained, or None for all that run.")
        if batch_dim is not None and (not isinstance(batch_dim, int) or batch_dim < 0):
            raise ValueError(f"SampleWatch(batch_dim={batch_dim!r}): expected a dimension counted from 0, or None.")
        self._asked_dim, self.batch_dim, self.token = batch_dim, batch_dim or 0, False
        self.model = model
        self.failed = ""
        self._mine = None if model is None else {id(module) for module in model.modules()}
        self._met: dict[int, _Met] = {}
        self._new: list[_Met] = []
        self._names: dict[int, dict[int, str]] = {}
        self._task, self._count = -1, 0
        self._passes: deque[_Pass] = deque()
        self._num_bytes = 0
        self._marks: deque[tuple[int, int, int, int]] = deque(maxlen=MOST_PASSES)
        self._since: dict[int, int] = {}
        self._lock = threading.Lock()

    def open(self) -> SampleWatch:
        """Begin; a second call does nothing."""
        if self not in _WATCHES:
            _WATCHES.append(self)
        if not _HOOK:
            _HOOK.append(torch_module.register_module_forward_hook(_after_forward, with_kwargs=True))
            torch_module._has_any_global_hook = _any_other_hook
        return self

    def close(self) -> None:
        """End; what was seen can still be read."""
        if self in _WATCHES:
            _WATCHES.remove(self)
        if not _WATCHES and _HOOK:
            _HOOK.pop().remove()

    def __enter__(self) -> SampleWatch:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def forget(self) -> None:
        """Drop all that was seen: a forked child begins anew."""
        self._lock = threading.Lock()
        self._passes, self._marks, self._since, self._num_bytes = deque(), deque(maxlen=MOST_PASSES), {}, 0

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A module has run; called by torch."""
        met = self._met.get(id(module))
        if met is None or met.module() is not module:
            met = self._meet(module)
        if met.kind is None or self.failed or not torch.is_grad_enabled():
            return
        if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
            return  # the tensors of a transformation are not those of a batch
        try:
            if isinstance(met.kind, LayerKind):
                self._see_layer(met, met.kind, module, args, kwargs, output)
            else:
                self._see_whole(met, met.kind, module, args, kwargs, output)
        except Exception as error:  # nothing of ours may end a training
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = f"samples are no longer seen ({error!r})"

    def _meet(self, module: nn.Module) -> _Met:
        compiled = hasattr(module, "_orig_mod") and hasattr(module, "dynamo_ctx")
        kinds: tuple[Any, ...] = (*WHOLE, *KINDS)
        kind = next((kind for kind in kinds if isinstance(module, kind.modules)), WholeKind() if compiled else None)
        mine = self._mine is None or id(module) in self._mine or (compiled and id(module._orig_mod) in self._mine)
        met = self._met[id(module)] = _Met(weakref.ref(module), kind if mine else None, len(self._met), compiled)
        met.learn()
        self._new.append(met)
        if self._asked_dim is None and mine and getattr(module, "batch_first", None) is False:
            self.batch_dim = 1
        return met

    def _see_layer(
        self, met: _Met, kind: LayerKind, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any
    ) -> None:
        if type(y) not in _PLAIN or not y.requires_grad or module.weight is None or not module.weight.requires_grad:
            return
        features = kind.features(module, module.weight)
        activation_S = None
        a = args[0] if args else next(iter(kwargs.values()))
        if kind.measures_activation and type(a) in _PLAIN and a.is_floating_point():
            activation_S = length(a, row_shape(a.shape, features[0], self.batch_dim), again=False)
        rows = row_shape(y.shape, features[1], self.batch_dim)
        y.register_hook(partial(self._take, met, activation_S, rows))

    def _see_whole(
        self, met: _Met, kind: WholeKind, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        outputs = [y for y in tree_leaves(output) if type(y) in _PLAIN]
        if not any(y.requires_grad for y in outputs):
            return
        given = (a for a in tree_leaves((args, kwargs)) if type(a) in _PLAIN and a.is_floating_point())
        a = next(given, None)  # of a recurrent net its input, of an attention its queries
        activation_S = None if a is None else length(a, rows_at(a, kind.dim_in(module, "input", a, self)), again=False)
        for place, y in enumerate(outputs):
            if y.requires_grad:
                rows = rows_at(y, kind.dim_out(module, place, y, self))
                y.register_hook(partial(self._take, met, activation_S, rows))

    def _take(self, met: _Met, activation_S: Tensor | None, rows: list[int], d: Tensor) -> None:
        """The signal is there; called by torch in the backward pass."""
        if torch.is_grad_enabled() or type(d) not in _PLAIN or self.failed:
            return  # a pass that is to be differentiated again is no step
        try:
            signal_S = length(d, rows, again=False)
            task = torch._C._current_graph_task_id()
            if task != self._task:
                with self._lock:
                    self._begin(task)
            now = self._passes[-1]
            if len(now.entries) < MOST_LAYERS:
                now.entries.append(_Entry(met, activation_S, signal_S))
                now.num_bytes += 4 * signal_S.numel() * (1 if activation_S is None else 2)
        except Exception as error:
            self._fail(error)

    def _begin(self, task: int) -> None:
        inside = task < self._task  # the passes after this one ran inside of it: reentrant checkpoints
        self._task = task
        for at in range(len(self._passes) - 1, -1, -1) if inside else ():
            if self._passes[at].task == task and self._passes[at].number >= max(self._since.values(), default=0):
                self._join(at)
                return
        if self._passes:
            self._num_bytes += self._passes[-1].num_bytes
        self._passes.append(_Pass(self._count, task))
        self._count += 1
        while len(self._passes) > MOST_PASSES or (self._num_bytes > MOST_BYTES and len(self._passes) > 2):
            self._num_bytes -= self._passes.popleft().num_bytes

    def _join(self, at: int) -> None:
        whole = self._passes[at]
        while len(self._passes) > at + 1:
            inner = self._passes.pop()
            whole.entries += inner.entries
            whole.num_bytes += inner.num_bytes
        self._count = whole.number + 1

    def name(self, stream: int, names: Mapping[int, str]) -> None:
        """Say which parameters, by id, belong to a stream of steps, and their names."""
        self._names[stream] = dict(names)
        self._since[stream] = self._since.get(stream, 0)

    def seal(self, stream: int, row: int) -> None:
        """All backward passes since this stream's last step belong to this row."""
        while self._new:
            self._new.pop().learn()  # sharded parameters are whole while their module runs: only now they are their own
        with self._lock:
            self._marks.append((stream, row, self._since.get(stream, 0), self._count))
            self._since[stream] = self._count

    def far(self, stream: int, rows: range) -> set[int]:
        """The rows in which the input of a sample may be far beyond those of its batch; waits for the device."""
        with self._lock:
            marks = [mark for mark in self._marks if mark[0] == stream and mark[1] in rows]
            passes = {one.number: one for one in self._passes}
        held: dict[Any, tuple[list[int], list[Tensor]]] = {}
        for _, row, first, end in marks:
            for one in (passes[number] for number in range(first, end) if number in passes):
                given = [entry for entry in list(one.entries) if entry.activation_S is not None]
                a_S = min(given, key=lambda entry: entry.met.place).activation_S if given else None
                if a_S is not None and len(a_S) > 1:
                    numbers, tensors = held.setdefault((len(a_S), a_S.device, a_S.dtype), ([], []))
                    numbers.append(row)
                    tensors.append(a_S)
        found: set[int] = set()
        for (size, *_), (numbers, tensors) in held.items():
            ordered = torch.stack(tensors).sort(1).values
            far = ordered[:, -1] > FAR * ordered[:, upper(size)]
            found |= {row for row, is_far in zip(numbers, far.tolist(), strict=True) if is_far}
        return found

    def read(self, stream: int, row: int, *, inputs_first: bool = False) -> Reading:
        """Which samples of the step in this row stood out, see `standing_out`; waits for the device."""
        with self._lock:
            mark = next((mark for mark in reversed(self._marks) if mark[:2] == (stream, row)), None)
            passes = list(self._passes)
        if mark is None:
            return Reading((), why="gone")
        return self._read(stream, passes, mark[2], mark[3], inputs_first)

    def read_last(self) -> Reading:
        """Which samples of the last backward pass stood out; waits for the device."""
        with self._lock:
            passes = list(self._passes)
        return self._read(-1, passes, self._count - 1, self._count)

    def _read(self, stream: int, passes: list[_Pass], first: int, end: int, inputs_first: bool = False) -> Reading:
        names = self._names.get(stream)
        if names is None:
            model = self.model
            names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
        covered: set[int] = set()
        layers: dict[int, str] = {}
        for met in list(self._met.values()):
            mine = [names[key] for key in met.keys if key in names]
            covered |= set(met.keys)
            if mine:
                label = mine[0].rpartition(".")[0] or "(model)"
                layers[id(met)] = "the compiled model" if met.compiled else label
        unruled = tuple(name for key, name in names.items() if key not in covered)
        if not passes or first >= end:
            return Reading((), why="unseen", unruled=unruled)
        if passes[0].number > first:
            return Reading((), why="gone", unruled=unruled)
        kept = [one for one in passes if one.number < end]
        host = [_on_host(one, layers) for one in kept[-(RECENT + end - first) :]]
        now = [one for one in host[-(end - first) :] if one]  # passes of another network are none of this stream's
        return standing_out(host[: -(end - first)], now, unruled, inputs_first=inputs_first)


def _on_host(one: _Pass, layers: Mapping[int, str]) -> list[Seen]:
    """The entries of a pass that belong to named layers, as arrays, in the order of the forward pass."""
    found = [
        Seen(
            layers[id(entry.met)],
            entry.met.place,
            None if entry.activation_S is None else entry.activation_S.cpu().double().numpy(),
            entry.signal_S.cpu().double().numpy(),
        )
        for entry in list(one.entries)
        if id(entry.met) in layers
    ]
    return sorted(found, key=lambda seen: seen.place)
