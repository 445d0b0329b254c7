"""TermSplitter: every term of the loss is a source of the whole gradient, and none may drown the others."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import looks, wide

__all__ = ["LeftOut", "TermRow", "TermSplitter"]


_PARTS = ("scale", "level", "worst")


class LeftOut(NamedTuple):
    """A term whose gradient was not finite: the number of the call, from 0, and its name."""

    step: int
    term: str


class TermRow(NamedTuple):
    """What the last call did to one term.

    Attributes:
        term: its name.
        norm: L2 norm of its gradient over all parameters, without its weight.
        limit: the largest norm it may have: the smallest of the terms' running maxima, times its relief.
        scale: what its gradient was multiplied by, in [0, 1], without its weight.
    """

    term: str
    norm: float
    limit: float
    scale: float


class _Term:
    """One term's running maxima of norm and value, the parameters that it reaches, and when it was last seen."""

    def __init__(self) -> None:
        self.scale: Tensor | None = None
        self.level: Tensor | None = None  # the smoothed value
        self.worst: Tensor | None = None  # the slowly decaying maximum of the value
        self.reaches: frozenset[int] = frozenset()
        self.seen = 0


class TermSplitter:
    """Replaces ``loss.backward()``: the gradient of each term of the loss is bounded before they are added.

        m_k <- min(max(n_k, decay m_k), growth m_k),  m_k = n_k at first;       n_k = ||g_k||
        p_k = v_k / V_k;  v_k <- .9 v_k + .1 L_k,  V_k <- max(L_k, decay V_k);   both L_k at first
        limit_k = (smallest m_j) min(relief, max(1, sqrt(p_k / smallest p_j)))
        gradient = sum_k w_k g_k min(1, limit_k / n_k)

    So a term that explodes keeps its direction and loses its size, and no weight has to be tuned. p_k is what is left
    of the term's value L_k: where the others have fallen and term k has not, its limit rises. Both minima are taken
    over the terms that share a parameter with term k and were seen in the last ``memory`` calls. A term whose value is
    not above zero has no relief, and gives none. A term of norm zero leaves its maximum as it is. A term that is not
    finite is left out of the call and named. The sum is added
    to ``.grad``, so accumulation works as ever, every call being one observation. One backward pass per term; terms
    may hold derivatives made with create_graph=True.

    Args:
        parameters: the parameters to be trained, or the model. With a DistributedDataParallel model each term's
            gradient is averaged over the ranks, so that the norms are those of the whole batch; all ranks must then
            call with the same terms.
        weights: term -> w_k, 1 where not named. A weight inside a term is no weight: the bound takes it out again.
        decay: what a running maximum keeps per call, in (0, 1].
        growth: largest ratio by which it rises per call, above 1.
        relief: largest factor by which the limit of a term that lags behind rises, at least 1; 1 for none.
        memory: calls after which a term that does not come again no longer counts, at least 1.
        scaler: the GradScaler of the training loop; do not call its ``scale``. A gradient that overflows although its
            term is finite is left to it.

    Raises:
        ValueError: no parameter, a constant out of range, or sharded parameters, whose gradients no single rank has.

    >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> terms = TermSplitter([w])
    >>> terms.backward(data=w[0], penalty=1e6 * w[1])
    >>> w.grad
    tensor([1., 1.])

    Source: the project's trials; Wang et al. 2021 and GradNorm change weights instead.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[Tensor],
        *,
        weights: Mapping[str, float] | None = None,
        decay: float = 0.999,
        growth: float = 1.05,
        relief: float = 10.0,
        memory: int = 1000,
        scaler: Any = None,
    ) -> None:
        self._ranks: Any = None
        if isinstance(parameters, nn.parallel.DistributedDataParallel):
            self._ranks = parameters.process_group
        self.parameters = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
        rules = {
            "decay": (decay, 0 < decay <= 1, "in (0, 1]"),
            "growth": (growth, growth > 1, "above 1"),
            "relief": (relief, relief >= 1, "of at least 1"),
            "memory": (memory, memory >= 1, "of at least 1"),
        }
        for name, (value, holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"TermSplitter({name}={value!r}): expected a number {rule}.")
        for name, weight in (weights or {}).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"TermSplitter(weights={{{name!r}: {weight!r}}}): expected finite weights of at least 0."
                )
        if not any(parameter.requires_grad for parameter in self.parameters):
            raise ValueError("TermSplitter(parameters): expected at least one parameter that requires a gradient.")
        if any(_is_sharded(parameter) for parameter in self.parameters):
            raise ValueError(
                "TermSplitter(parameters): expected whole parameters, got sharded ones (FSDP), whose gradients are "
                "made by hooks that one backward pass per term goes past. Use DistributedDataParallel."
            )
        self.weights = dict(weights or {})
        self.decay, self.growth, self.relief, self.memory, self.scaler = decay, growth, relief, memory, scaler
        self._terms: dict[str, _Term] = {}
        self._calls = 0
        self._left_out: deque[tuple[int, str, Tensor]] = deque(maxlen=10_000)
        self._last: list[tuple[str, Tensor, Tensor, Tensor]] = []
        self._said = False

    def backward(self, **terms: Tensor) -> None:
        """Add the bounded gradient of the sum of the terms to ``.grad``.

        Args:
            terms: name -> a term of the loss, a single number with a graph. A term that is not there in this step is
                left away.

        Raises:
            ValueError: no term, or one that is no single number or has no graph; nothing has been added then.
        """
        self._check(terms)
        chosen = [k for k, parameter in enumerate(self.parameters) if parameter.requires_grad]
        parameters = [self.parameters[k] for k in chosen]
        gradients: dict[str, list[Tensor | None]] = {}
        values: dict[str, Tensor] = {}
        for place, (name, term) in enumerate(terms.items(), 1):
            gradients[name], values[name] = self._gradient(name, term, parameters, keep=place < len(terms))
        norms = {name: _norm(found, terms[name]) for name, found in gradients.items()}
        unit = None if self.scaler is None else self.scaler.scale(wide(torch.ones((), device=parameters[0].device)))
        lefts = {}
        for name, found in gradients.items():
            norms[name] = norm = norms[name] if unit is None else norms[name] / unit
            finite = norm.isfinite()
            # Under a scaler what overflows although the term is finite must reach the scaler.
            lefts[name] = ~finite if unit is None else ~finite & ~terms[name].detach().isfinite().view(())
            row = self._terms.setdefault(name, _Term())
            row.scale = self._followed(row.scale, norm, finite)
            self._watch(row, values[name])
            row.reaches = frozenset(k for k, gradient in zip(chosen, found, strict=True) if gradient is not None)
            row.seen = self._calls
        self._last = []
        for name, found in gradients.items():
            limit = self._limit(name)
            norm = norms[name]
            scale = torch.where(norm > limit, limit / norm, 1.0)
            scale = torch.where(norm.isfinite(), scale, torch.where(lefts[name], 0.0, 1.0))
            self._last.append((name, norm, limit, scale))
            self._add(parameters, found, scale * self.weights.get(name, 1.0), lefts[name])
        self._note(lefts)
        self._calls += 1

    def named(self) -> list[LeftOut]:
        """The terms that were not finite and were left out, oldest first; waits for the device."""
        return [LeftOut(step, name) for step, name, left in self._left_out if bool(left)]

    def rows(self) -> list[TermRow]:
        """What the last call did to its terms, in their order; waits for the device."""
        return [TermRow(name, float(norm), float(limit), float(scale)) for name, norm, limit, scale in self._last]

    def state_dict(self) -> dict[str, Any]:
        """The running maxima, and when each term was last seen."""
        rows = {
            name: {
                **{part: getattr(row, part).clone() for part in _PARTS},
                "reaches": sorted(row.reaches),
                "seen": row.seen,
            }
            for name, row in self._terms.items()
            if row.scale is not None
        }
        return {"calls": self._calls, "terms": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: it comes from a splitter of more parameters.
        """
        found: dict[str, _Term] = {}
        for name, row in state["terms"].items():
            found[name] = term = _Term()
            term.seen = int(row["seen"])
            for part in _PARTS:
                setattr(term, part, row[part].clone() if part in row else None)
            term.reaches = frozenset(row["reaches"])
            if term.reaches and max(term.reaches) >= len(self.parameters):
                raise ValueError(
                    f"TermSplitter.load_state_dict(…): the term {name!r} reaches parameter {max(term.reaches)}, there "
                    f"are {len(self.parameters)}. Load it into a splitter of the same model."
                )
        self._terms, self._calls = found, int(state["calls"])

    def _check(self, terms: Mapping[str, Tensor]) -> None:
        if not terms:
            raise ValueError("TermSplitter.backward(): expected at least one term, as in backward(data=loss).")
        for name, term in terms.items():
            call = f"TermSplitter.backward({name}=…)"
            if not isinstance(term, Tensor) or term.numel() != 1:
                got = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
                raise ValueError(f"{call}: expected a tensor with a single number, got {got}. Take its sum or mean.")
            if not term.requires_grad:
                raise ValueError(
                    f"{call}: expected a term with a graph, got one without a gradient. Leave the keyword out in steps "
                    "in which the term is a constant."
                )

    def _gradient(
        self, name: str, term: Tensor, parameters: Sequence[Tensor], *, keep: bool
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradient and the value of one term, averaged over the ranks."""
        value = wide(term.detach()).view(())
        term = term if self.scaler is None else self.scaler.scale(term)
        made = torch.autograd.grad(term.sum(), parameters, retain_graph=keep, allow_unused=True)
        found: list[Tensor | None] = list(made)
        if any(gradient is not None and gradient.is_sparse for gradient in found):
            raise ValueError(f"TermSplitter.backward({name}=…): expected dense gradients. Use Embedding(sparse=False).")
        if self._ranks is None:
            return found, value
        # A term may miss a parameter on one rank and reach it on another: the flags travel with the numbers.
        reached = torch.tensor([gradient is not None for gradient in found], device=parameters[0].device)
        flat = [
            (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1)
            for gradient, parameter in zip(found, parameters, strict=True)
        ]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in flat) else torch.float32
        sent = torch.cat([*(part.to(dtype) for part in flat), value.to(dtype).view(1), reached.to(dtype)])
        torch.distributed.all_reduce(sent, group=self._ranks)
        count = torch.distributed.get_world_size(self._ranks)
        *parts, mean = (sent[: -len(parameters)] / count).split([*(part.numel() for part in flat), 1])
        used = (sent[-len(parameters) :] > 0).tolist()
        gradients = [
            part.view_as(parameter).to(parameter.dtype) if use else None
            for part, parameter, use in zip(parts, parameters, used, strict=True)
        ]
        return gradients, wide(mean).view(())

    def _followed(self, scale: Tensor | None, norm: Tensor, finite: Tensor) -> Tensor:
        """The running maximum after this norm."""
        old = torch.zeros_like(norm) if scale is None else scale.to(norm)
        moved = torch.minimum(torch.maximum(norm, self.decay * old), self.growth * old)
        return torch.where(finite & (norm > 0), torch.where(old > 0, moved, norm), old)

    def _watch(self, row: _Term, value: Tensor) -> None:
        """Follow the value of a term, where it is finite."""
        if row.level is None or row.worst is None:
            row.level = row.worst = torch.where(value.isfinite(), value, 0.0)
            return
        old, worst = row.level.to(value), row.worst.to(value)
        # A term that has been at zero so far begins here.
        level = torch.where(worst > 0, 0.9 * old + 0.1 * value, value)
        row.level = torch.where(value.isfinite(), level, old)
        row.worst = torch.where(value.isfinite(), torch.maximum(value, self.decay * worst), worst)

    def _limit(self, name: str) -> Tensor:
        mine = self._terms[name]
        near = [
            row
            for row in self._terms.values()
            if self._calls - row.seen < self.memory and (row is mine or row.reaches & mine.reaches)
        ]
        scales = torch.stack([row.scale for row in near if row.scale is not None])
        smallest = torch.where(scales > 0, scales, math.inf).min()
        if self.relief == 1 or len(near) == 1:
            return smallest
        least = torch.stack([_progress(row, math.inf) for row in near]).min()
        return smallest * (_progress(mine, 0.0) / least).sqrt().clamp(1.0, self.relief)

    def _add(self, parameters: Sequence[Tensor], found: list[Tensor | None], factor: Tensor, left: Tensor) -> None:
        if looks(left) and bool(left):
            return
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is None:
                continue
            part = gradient * factor.to(gradient.dtype)
            if not looks(left):
                part = torch.where(left, torch.zeros((), dtype=part.dtype, device=part.device), part)
            if parameter.grad is None:
                parameter.grad = part
            else:
                parameter.grad.add_(part)

    def _note(self, lefts: Mapping[str, Tensor]) -> None:
        for name, left in lefts.items():
            if not looks(left) or bool(left):
                self._left_out.append((self._calls, name, left))
        if not self._said and all(looks(left) and bool(left) for left in lefts.values()):
            self._said = True
            warnings.warn(
                "TermSplitter: no term of the step has a finite gradient, so that nothing was added. Look at the input "
                "or at the weights if this lasts.",
                UserWarning,
                stacklevel=3,
            )


def _norm(gradients: Sequence[Tensor | None], term: Tensor) -> Tensor:
    """The L2 norm over all parameters, in float64 where the device has it."""
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return wide(torch.zeros((), device=term.device))
    dtype = torch.float64 if looks(found[0]) or found[0].dtype == torch.float64 else torch.float32
    norms = [torch.linalg.vector_norm(gradient.detach(), dtype=dtype) for gradient in found]
    return wide(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))


def _progress(row: _Term, otherwise: float) -> Tensor:
    """The value of a term over its largest, 1 where nothing has fallen; `otherwise` where it is not above zero."""
    assert row.level is not None and row.worst is not None
    return torch.where((row.level > 0) & (row.worst > 0), row.level / row.worst, otherwise)


def _is_sharded(parameter: Tensor) -> bool:
    return type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "device_mesh")
