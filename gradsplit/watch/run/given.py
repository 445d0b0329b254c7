"""How large the batches are: what the first layers were given, read from the graph of the loss.

A batch that is a thousand times too large may leave no trace in the gradient, where a normalisation or a saturated unit
takes it up. torch keeps the input of a layer for backward, so that no hook is needed to see it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .patched import kept_by, operations_of

__all__ = ["Given", "Sizes", "UNLIKE", "largest_given"]

_NO_DATA = ("result", "output", "weight", "running", "save_", "logsumexp")  # names of what operations keep
_NUMBERED = 1 << 62  # sequence numbers from here on are those of leaves


def largest_given(loss: Tensor) -> float:
    """Return the largest magnitude among the data that a forward pass was given; 0 where none was kept.

    Data are tensors that operations keep for backward, that need no gradient and that no operation made: inputs and
    targets. Statistics that a layer keeps for itself are no data, and neither is a single number (a scaler's factor).

    >>> w, x = torch.ones(2, requires_grad=True), torch.tensor([3.0, -7.0])
    >>> largest_given((w * x).sum())
    7.0
    """
    largest = 0.0
    for node in operations_of(loss):
        if int(node._sequence_nr()) < _NUMBERED:
            for name, kept in kept_by(node).items():
                if _is_data(name, kept):
                    size = float(kept.detach().abs().max())
                    largest = max(largest, size) if math.isfinite(size) else largest
    return largest


def _is_data(name: str, kept: Tensor) -> bool:
    """Whether what an operation has kept under a name was given to it as data."""
    plain = type(kept) is Tensor and kept.is_floating_point() and kept.layout == torch.strided and not kept.is_meta
    own = any(word in name for word in _NO_DATA)
    return plain and not own and not kept.requires_grad and kept.dim() > 0 and kept.numel() > 0


class _Place(NamedTuple):
    """Where a graph keeps what one of its first layers was given, and how large that was the first time."""

    path: tuple[int, ...]  # from the loss down: which of the operations below comes next
    operation: str
    kept: str
    first: float  # root mean square


_MOST_PLACES = 4  # layers whose input is read, those nearest to the batch
_MOST_WAYS = 8  # kinds of graphs: two networks of one script have a kind each
_MOST_STEPS_DOWN = 2000  # operations between the loss and a layer: following a longer path would take too long
_SEARCHED = 8  # backward passes whose graph is searched as a whole; later
_SEARCHED_EACH = 64  # only each of so many


class Given:
    """The root mean square of what the first layers were given, as a multiple of the first time.

    A layer is given data if it reads a parameter and keeps floating-point numbers that need no gradient. Such layers
    are found in the graph once. From then on a backward pass costs one norm for each of them. Of several layers, and of
    several backward passes before a step, the largest multiple counts. Nothing waits for another device than the CPU.
    """

    def __init__(self) -> None:
        self._ways: list[tuple[_Place, ...]] = []
        # (id of the parameter, name of what is kept, use of the layer in the graph) -> its size at the first pass
        self._firsts: dict[tuple[int, str, int], float] = {}
        self._passes, self._missed = 0, 0
        self._largest: Tensor | float | None = None
        self._last: Tensor | float = math.nan

    @torch.no_grad()
    def look(self, loss: Tensor) -> None:
        """Read what backward is about to be called on."""
        self._passes += 1
        # A single graph unlike the others is searched, too: an odd batch may take another way through a layer.
        regular = self._missed < _SEARCHED or self._passes % _SEARCHED_EACH == 0
        if self._missed >= _SEARCHED_EACH and not regular:
            return  # the script makes a new kind of graph again and again
        for way in self._ways:
            if self._read(loss, way):
                if way is not self._ways[0]:
                    self._ways.remove(way)
                    self._ways.insert(0, way)  # the next pass is most likely of the same kind
                self._missed = 0
                return
        self._missed += 1
        way = _places_in(loss, self._firsts) if regular else ()
        if way and self._read(loss, way):
            self._ways = [way, *self._ways[: _MOST_WAYS - 1]]
        elif self._largest is None:
            self._last = math.nan

    def _read(self, loss: Tensor, way: tuple[_Place, ...]) -> bool:
        """Take in what the layers were given, if the graph is of this kind."""
        found: list[tuple[Tensor, float]] = []
        for place in way:
            data = _follow(loss.grad_fn, place)
            if data is None:
                return False
            found.append((data, place.first))
        for data, first in found:
            self._take_in(_root_mean_square(data, 1.0 / first))
        return True

    def take(self) -> Tensor | float:
        """Return the largest multiple since the last step; a second optimizer on the same backward gets it again.

        nan: nothing was seen. inf: it was not finite.
        """
        if self._largest is not None:
            self._last, self._largest = self._largest, None
        return self._last

    def _take_in(self, times: Tensor | float) -> None:
        before = self._largest
        if before is None:
            self._largest = times
        elif isinstance(before, Tensor) or isinstance(times, Tensor):
            self._largest = torch.maximum(torch.as_tensor(before), torch.as_tensor(times))
        else:
            self._largest = max(before, times)


def _follow(node: Any, place: _Place) -> Tensor | None:
    """Return what is kept at a place of this graph; None where the graph is of another kind."""
    for k in place.path:
        if node is None:
            return None
        below = node.next_functions
        if k >= len(below):
            return None
        node = below[k][0]
    if node is None or node.name() != place.operation:
        return None
    kept = kept_by(node).get(place.kept)
    return kept if kept is not None and _is_data(place.kept, kept) else None


def _root_mean_square(data: Tensor, factor: float) -> Tensor | float:
    """Root mean square times a factor, inf where it is not finite; a number on a CPU, elsewhere a tensor."""
    half = data.dtype in (torch.float16, torch.bfloat16)
    norm = torch.linalg.vector_norm(data.detach(), dtype=torch.float32 if half else None)
    factor /= math.sqrt(data.numel())
    if data.device.type == "cpu":
        value = float(norm) * factor
        return value if math.isfinite(value) else math.inf
    scaled: Tensor = (norm * factor).nan_to_num(nan=math.inf)
    return scaled


def _places_in(loss: Tensor, firsts: dict[tuple[int, str, int], float]) -> tuple[_Place, ...]:
    """Search a graph for the first layers that were given data, by the shortest path to each.

    A layer that was seen in a graph of another kind keeps its first size.
    """
    if loss.grad_fn is None:
        return ()
    parents: dict[Any, tuple[Any, int]] = {loss.grad_fn: (None, 0)}
    waiting = deque([loss.grad_fn])
    layers: list[tuple[int, Any, Tensor]] = []  # number, operation, its weight
    while waiting and len(parents) <= _MOST_SEARCHED:
        node = waiting.popleft()
        for k, (below, _) in enumerate(node.next_functions):
            if below is not None and below not in parents:
                parents[below] = (node, k)
                waiting.append(below)
        leaf = _leaf_of(node) if int(node._sequence_nr()) < _NUMBERED else None
        if leaf is not None:
            layers.append((int(node._sequence_nr()), node, leaf))
    found: list[_Place] = []
    times: Counter[tuple[int, str]] = Counter()  # a graph may go through a layer several times
    for _, node, leaf in sorted(layers, key=lambda layer: layer[0]):
        for name, kept in kept_by(node).items():
            if not _is_data(name, kept):
                continue
            # What one operation calls its first matrix is the tensor itself to another.
            of_layer = (id(leaf), "data" if name in ("self", "mat1", "input", "other") else name)
            times[of_layer] += 1
            key = (*of_layer, times[of_layer])
            first = firsts.get(key) or float(_root_mean_square(kept, 1.0))
            path = _path_to(node, parents)
            if 0 < first < math.inf and len(path) <= _MOST_STEPS_DOWN and len(found) < _MOST_PLACES:
                firsts[key] = first
                found.append(_Place(path, node.name(), name, first))
    return tuple(found)


_MOST_SEARCHED = 100_000  # operations


def _path_to(node: Any, parents: dict[Any, tuple[Any, int]]) -> tuple[int, ...]:
    path: list[int] = []
    while parents[node][0] is not None:
        node, k = parents[node]
        path.append(k)
    return tuple(reversed(path))


def _leaf_of(node: Any) -> Tensor | None:
    """Return the last leaf that an operation reads itself, or through views and casts of it alone: its weight."""
    for below, _ in reversed(node.next_functions):
        for _ in range(4):
            if below is None or isinstance(getattr(below, "variable", None), Tensor):
                break
            behind = below.next_functions
            below = behind[0][0] if len(behind) == 1 else None
        leaf = getattr(below, "variable", None)
        if isinstance(leaf, Tensor):
            return leaf
    return None


_JUMP = 4.0  # of a loss over the largest of those before it, at which the batch is looked at
_RECENT = 8  # losses that it is held against
_AGAIN = 64  # backward passes between two looks at ordinary batches
UNLIKE = 10.0  # of a batch's largest magnitude over that of the batches before it


class Sizes:
    """The largest magnitude in the batches, read at the first ones, thinly later, and where the loss jumps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._usual, self._count = 0.0, 0

    def look(self, loss: float, read: Callable[[], float]) -> float:
        """Return by how much the batch of this loss is larger than those before it; 1 where it was not read."""
        jumped = len(self._losses) > 0 and abs(loss) > _JUMP * max(map(abs, self._losses))
        regular = self._count < _RECENT or self._count % _AGAIN == 0
        self._count += 1
        self._losses.append(loss)
        if not (jumped or regular):
            return 1.0
        size = read()
        times = size / self._usual if self._usual > 0 else 1.0
        if times <= UNLIKE:  # a batch that stands out is no measure for the next
            self._usual = max(self._usual, size)
            return 1.0
        return times
