"""One number per sample or term of the loss: how large it is, and how large it may be, on its device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    *("RULES", "Rule", "RunningLimit", "TermLimits", "all_finite", "length", "looks", "masked", "row_shape"),
    *("rule_of", "spread", "times", "wide"),
]


def wide(number_S: Tensor) -> Tensor:
    """The numbers in float64, where the device has it."""
    return number_S.float() if number_S.device.type == "mps" else number_S.double()


def row_shape(shape: Sequence[int], num_features: int, batch_dim: int, token: bool = False) -> list[int]:
    """The shape of one number per sample, which broadcasts against a tensor of the given shape.

    The last ``num_features`` dimensions are the sample's content. A tensor without others is one sample. Where a
    tensor has fewer dimensions than ``batch_dim`` asks for, its last leading one is the batch.

    >>> row_shape((8, 5, 3), 1, 0), row_shape((8, 5, 3), 1, 1), row_shape((8, 5, 3), 1, 0, token=True)
    ([8, 1, 1], [1, 5, 1], [8, 5, 1])
    """
    lead = len(shape) - num_features
    rows = [1] * len(shape)
    for dim in range(lead) if token else range(min(batch_dim, lead - 1), min(batch_dim, lead - 1) + 1):
        if dim >= 0:
            rows[dim] = shape[dim]
    return rows


def looks(tensor: Tensor) -> bool:
    """Whether a value may be looked at in the middle of a step, since its device has no queue to wait for."""
    return tensor.device.type == "cpu"


def all_finite(norm_S: Tensor) -> bool:
    """Whether every norm is finite; waits for the device."""
    return math.isfinite(norm_S.sum())


def length(tensor: Tensor, rows: Sequence[int], *, again: bool = True) -> Tensor:
    """The L2 norm of every sample, in one dimension; at least float32.

    On the CPU a row whose float32 norm overflows is measured again in float64. On other devices, where a look would
    wait, its norm is inf and the row counts as not finite; so on the CPU without ``again``.
    """
    tensor = tensor.detach()
    size = tensor.numel()
    if size == 0:
        return tensor.new_zeros(math.prod(rows), dtype=torch.float32)
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    dims: list[int] | int
    if rows[:1] == [size] or rows[:1] != list(tensor.shape[:1]) or math.prod(rows) != rows[0]:
        dims = [dim for dim, count in enumerate(rows) if count != tensor.shape[dim]]
    else:  # the samples lie in dimension 0: the rest of each is one run of numbers
        tensor, dims = tensor.flatten(1), 1
    norm = tensor.to(dtype).abs() if dims == [] else torch.linalg.vector_norm(tensor, dim=dims, dtype=dtype)
    norm_S = norm.reshape(-1)
    if again and dims != [] and looks(norm_S) and not all_finite(norm_S):
        norm_S = torch.linalg.vector_norm(tensor, dim=dims, dtype=torch.float64).reshape(-1)
    return norm_S


def spread(number_S: Tensor, rows: Sequence[int]) -> Tensor:
    """One number per sample, in the shape that broadcasts against the tensor."""
    return number_S.view(list(rows))


def times(tensor: Tensor, factor_S: Tensor, sound_S: Tensor | None, rows: Sequence[int]) -> Tensor:
    """Every sample times its factor; zeros, never 0 * inf, where it is not sound. Halves are multiplied in float32."""
    wider = torch.promote_types(tensor.dtype, torch.float32)  # a half holds neither a tiny factor nor one over it
    scaled = (tensor * spread(factor_S, rows).to(wider)).to(tensor.dtype)
    if sound_S is None:
        return scaled
    return torch.where(spread(sound_S, rows), scaled, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def masked(tensor: Tensor, sound_S: Tensor | None, rows: Sequence[int]) -> Tensor:
    """The tensor with zeros where a sample is not sound."""
    if sound_S is None:
        return tensor
    return torch.where(spread(sound_S, rows), tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


class Rule(Protocol):
    """What gives a layer its limit; the scale is 0 before the first batch."""

    def follow(self, scale: Tensor, norm_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """The new scale and the limit, both without dimensions, from the norms of the samples that count."""


@dataclass(frozen=True)
class RunningLimit:
    """A multiple of a running quantile of the samples' norms.

        q_t = the quantile of the batch;   m_1 = q_1
        m_t = m_{t-1} exp(min(up log(q_t / m_{t-1}), log growth))   if q_t > m_{t-1},   up -> down otherwise
        limit = factor m_t

    Samples whose norm is zero or not finite do not count. A batch without any that counts leaves the scale as it is.

    Args:
        quantile: in (0, 1]; 0.5 is the lower median.
        factor: limit / scale, above 0.
        up: share of the logarithmic distance by which the scale rises per batch, in (0, 1].
        down: the same share where it falls, in [0, 1].
        growth: largest ratio by which the scale rises per batch, above 1.

    Raises:
        ValueError: a constant outside its range.

    >>> import torch
    >>> norms = torch.tensor([1.0, 2.0, 3.0, 1e9])
    >>> scale, limit = RunningLimit(quantile=0.5, factor=3.0).follow(torch.zeros(()), norms, norms > 0)
    >>> scale.item(), limit.item()
    (2.0, 6.0)

    Source: the project's trials.
    """

    quantile: float = 0.5
    factor: float = 3.0
    up: float = 0.1
    down: float = 0.1
    growth: float = 1.25

    def __post_init__(self) -> None:
        rules = {
            "quantile": (0 < self.quantile <= 1, "in (0, 1]"),
            "factor": (self.factor > 0, "above 0"),
            "up": (0 < self.up <= 1, "in (0, 1]"),
            "down": (0 <= self.down <= 1, "in [0, 1]"),
            "growth": (self.growth > 1, "above 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"RunningLimit({name}={getattr(self, name)!r}): expected a number {rule}.")

    def follow(self, scale: Tensor, norm_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """The new scale and the limit; nothing waits for the device."""
        if not norm_S.numel():
            return scale, torch.where(scale > 0, self.factor * scale, math.inf)
        ordered_S = torch.where(counts_S, norm_S, math.inf).sort().values
        count = counts_S.sum()
        index = ((count * self.quantile).ceil().long() - 1).clamp(min=0)
        now = ordered_S.gather(0, index.view(1)).view(())
        distance = (now / scale).log()
        move = torch.where(distance > 0, (self.up * distance).clamp(max=math.log(self.growth)), self.down * distance)
        scale = torch.where(count > 0, torch.where(scale > 0, scale * move.exp(), now), scale)
        return scale, torch.where(scale > 0, self.factor * scale, math.inf)

    def follow_numbers(self, scale: float, norms: np.ndarray) -> tuple[float, float, float]:
        """The same for numbers, and the largest of them: on the CPU a call of NumPy costs a third of one of torch.

        Norms that are zero or not finite do not count. The largest is nan where one is nan.
        """
        ordered = np.sort(norms)
        largest = float(ordered[-1]) if ordered.size else 0.0
        if ordered.size and not (ordered[0] > 0 and largest < math.inf):
            ordered = ordered[np.searchsorted(ordered, 0.0, "right") : np.searchsorted(ordered, math.inf)]
        if ordered.size:
            now = float(ordered[max(math.ceil(ordered.size * self.quantile) - 1, 0)])
            if scale > 0:
                distance = math.log(now / scale)
                up = min(self.up * distance, math.log(self.growth))
                scale *= math.exp(up if distance > 0 else self.down * distance)
            else:
                scale = now
        return scale, self.factor * scale if scale > 0 else math.inf, largest


# The norms of classified samples are heavy-tailed, since a fitted sample has almost none: the upper quantile is the
# scale, and falls slowly. Those of regression are not, and there a wide limit lets the outliers through.
RULES: dict[str, Rule] = {
    "classification": RunningLimit(quantile=0.9, factor=2.0, up=0.1, down=0.002),
    "regression": RunningLimit(quantile=0.5, factor=3.0, up=0.1, down=0.1),
}


def rule_of(kind: str | Rule, call: str) -> Rule:
    """The rule that a name stands for, or the rule itself.

    Raises:
        ValueError: neither a name of the table nor an object with ``follow``.
    """
    if isinstance(kind, str) and kind in RULES:
        return RULES[kind]
    if isinstance(kind, str) or not callable(getattr(kind, "follow", None)):
        names = " or ".join(map(repr, RULES))
        raise ValueError(f"{call}(kind={kind!r}): expected {names}, or a rule as RunningLimit(quantile=0.5).")
    return kind


_PARTS = ("scale", "level", "worst")


class TermLimits:
    """The running maxima of the terms' norms, the levels of their values, and from both the limits: see `TermSplitter`.

    Args:
        decay: what a maximum keeps per call.
        growth: largest ratio by which it rises.
        relief: largest factor on the limit of a term that lags behind.
        memory: calls after which a term that does not come again no longer counts.
    """

    def __init__(self, decay: float, growth: float, relief: float, memory: float) -> None:
        self.decay, self.growth, self.relief, self.memory = decay, growth, relief, memory
        self.calls = 0
        # Per term, in the order of their first calls: scale, level and worst are m, v and V of the formula.
        self.places: dict[str, int] = {}
        self.reaches: list[frozenset[int]] = []
        self._state: Tensor | list[list[float]] = [[], [], []]
        self._seen: list[int] = []
        self._marks: dict[int, tuple[list[int], list[Any]]] = {}  # per place, what its reach was made from
        self._changes = 0
        self._near: tuple[Any, list[list[int]]] | None = None
        self._on_device: tuple[list[list[int]], Tensor, Tensor] | None = None
        self._bundled: tuple[Any, list[tuple[list[int], list[bool]]]] | None = None

    def enter(
        self,
        names: tuple[str, ...],
        chosen: list[int],
        gradients: Sequence[Sequence[Tensor | None]],
        greet: Callable[[str, tuple[str, ...]], None],
    ) -> list[int]:
        """The places of the terms of this call; note what they reach and that they were seen.

        Args:
            names: of the terms.
            chosen: which parameters the gradients belong to.
            gradients: per term, None where it does not reach a parameter.
            greet: called for a term that is new, before it has a place.
        """
        places = []
        for name, gradient in zip(names, gradients, strict=True):
            place = self.places.get(name)
            if place is None:
                greet(name, names)
                place = self.places[name] = len(self.places)
                self.reaches.append(frozenset())
                self._seen.append(0)
            mark = [None if g is None else g.dtype for g in gradient]
            if self._marks.get(place) != (chosen, mark):
                self._marks[place] = chosen, mark
                self.reaches[place] = frozenset(k for k, dtype in zip(chosen, mark, strict=True) if dtype)
                self._changes += 1
            self._seen[place] = self.calls
            places.append(place)
        return places

    def observe(self, places: list[int], norm_K: Tensor, value_K: Tensor) -> Tensor:
        """The state after this call, and from it the limit of every term of the call."""
        count = len(self.places)
        state = self._as_tensor().to(norm_K)
        if state.shape[1] < count:
            state = torch.cat([state, state.new_zeros(3, count - state.shape[1])], 1)
        index, near = self._tables(places, norm_K.device)
        old = state[:, index]
        new = torch.stack([_followed(old[0], norm_K, self.decay, self.growth), *_watched(old[1:], value_K, self.decay)])
        self._state = state = state.index_copy(1, index, new)
        smallest_K = torch.where(near & (state[0] > 0), state[0], math.inf).amin(1)
        if self.relief == 1:
            return smallest_K
        left = _progress(state)
        least_K = torch.where(near & (left > 0), left, math.inf).amin(1)
        return smallest_K * (left[index] / least_K).sqrt().clamp(1.0, self.relief)

    def _tables(self, places: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the terms of a call stand, and which bound each: copied to the device where they change."""
        others = self.neighbours(places)
        if self._on_device is None or self._on_device[0] is not others or self._on_device[1].device != device:
            near = torch.zeros(len(places), len(self.places), dtype=torch.bool)
            for row, these in enumerate(others):
                near[row, these] = True
            self._on_device = others, torch.tensor(places, device=device), near.to(device)
        return self._on_device[1:]

    def observe_numbers(self, places: list[int], norms: list[float], values: list[float]) -> list[float]:
        """The same in Python's numbers: on the CPU a call of torch costs more than the whole rule."""
        state: list[list[float]] = self._state.tolist() if isinstance(self._state, Tensor) else self._state
        self._state = maxima, levels, worsts = state
        for part in state:
            part.extend(0.0 for _ in range(len(self.places) - len(part)))
        inf = math.inf
        for k, norm, value in zip(places, norms, values, strict=True):
            if 0 < norm < inf:
                maxima[k] = _followed_number(maxima[k], norm, self.decay, self.growth)
            if -inf < value < inf:
                worst = worsts[k]
                levels[k] = 0.9 * levels[k] + 0.1 * value if worst > 0 else value
                worsts[k] = max(value, self.decay * worst)
        lefts = [_progress_number(level, worst) for level, worst in zip(levels, worsts, strict=True)]
        limits = []
        for k, others in zip(places, self.neighbours(places), strict=True):
            limit = min((maxima[j] for j in others if maxima[j] > 0), default=inf)
            left = lefts[k]
            if self.relief > 1 and left < inf:
                limit *= min(max(math.sqrt(left / min(lefts[j] for j in others)), 1.0), self.relief)
            limits.append(limit)
        return limits

    def bundles(self, places: list[int]) -> list[tuple[list[int], list[bool]]]:
        """Parameters of one dtype that the same terms reach: where they are, and which terms of the call reach them."""
        key = places, self._changes
        if self._bundled is None or self._bundled[0] != key:
            found: dict[tuple[Any, ...], list[int]] = {}
            for k, dtypes in enumerate(zip(*(self._marks[place][1] for place in places), strict=True)):
                if any(dtypes):
                    found.setdefault(dtypes, []).append(k)
            self._bundled = key, [(members, [d is not None for d in dtypes]) for dtypes, members in found.items()]
        return self._bundled[1]

    def neighbours(self, places: list[int]) -> list[list[int]]:
        """Which terms bound each term of the call: those that share a parameter with it and are alive, and itself."""
        alive = [self.calls - seen < self.memory for seen in self._seen]
        key = places, alive, self._changes
        if self._near is None or self._near[0] != key:
            reaches = self.reaches
            near = [
                [j for j, lives in enumerate(alive) if lives and (j == k or not reaches[j].isdisjoint(reaches[k]))]
                for k in places
            ]
            self._near = key, near
        return self._near[1]

    def state_dict(self) -> dict[str, Any]:
        """All that the next call depends on."""
        state = self._as_tensor()
        rows = {
            name: {
                **dict(zip(_PARTS, state[:, k].clone(), strict=True)),
                "reaches": sorted(self.reaches[k]),
                "seen": self._seen[k],
            }
            for name, k in self.places.items()
        }
        return {"calls": self.calls, "terms": rows}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a saved state."""
        rows = list(state["terms"].values())
        columns = [torch.stack([torch.as_tensor(row.get(part, 0.0), device=device) for part in _PARTS]) for row in rows]
        self._state = wide(torch.stack(columns, 1)) if columns else [[], [], []]
        self.places = {name: k for k, name in enumerate(state["terms"])}
        self.reaches = [frozenset(row["reaches"]) for row in rows]
        self._seen = [int(row["seen"]) for row in rows]
        self.calls = int(state["calls"])
        self._marks, self._near, self._bundled, self._on_device = {}, None, None, None

    def _as_tensor(self) -> Tensor:
        return self._state if isinstance(self._state, Tensor) else torch.tensor(self._state, dtype=torch.float64)


def _followed(old_K: Tensor, norm_K: Tensor, decay: float, growth: float) -> Tensor:
    """The running maxima after these norms; zero means that there was none so far."""
    moved_K = torch.minimum(torch.maximum(norm_K, decay * old_K), growth * old_K)
    return torch.where(norm_K.isfinite() & (norm_K > 0), torch.where(old_K > 0, moved_K, norm_K), old_K)


def _followed_number(old: float, norm: float, decay: float, growth: float) -> float:
    """The same for one norm that is finite and above zero."""
    return min(max(norm, decay * old), growth * old) if old > 0 else norm


def _watched(old: Tensor, value_K: Tensor, decay: float) -> Tensor:
    """The levels and the largest values after these values, which count where they are finite."""
    level_K, worst_K = old
    # A term that has not been above zero so far begins here.
    level_K = torch.where(worst_K > 0, 0.9 * level_K + 0.1 * value_K, value_K)
    return torch.where(value_K.isfinite(), torch.stack([level_K, torch.maximum(value_K, decay * worst_K)]), old)


def _progress(state: Tensor) -> Tensor:
    """What is left of every term: its level over its largest value; 0 where it is not above zero."""
    _, level, worst = state
    return torch.where((level > 0) & (worst > 0), level / worst, 0.0)


def _progress_number(level: float, worst: float) -> float:
    """The same for one term; inf where it is not above zero, since it gives no relief then."""
    return level / worst if level > 0 and worst > 0 else math.inf
